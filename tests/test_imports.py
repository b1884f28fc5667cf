"""The core stays light: a fresh interpreter that imports it loads no framework."""

import subprocess
import sys

import pytest

FRAMEWORKS = ("diffusers", "transformers", "matplotlib", "comfy", "accelerate", "peft", "huggingface_hub", "typer")


@pytest.mark.parametrize(("module", "absent"), [("actmaps", ("torch", *FRAMEWORKS)), ("actmaps.maps", FRAMEWORKS)])
def test_importing_the_core_imports_no_framework(module, absent):
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

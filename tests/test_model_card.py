"""The model card: what the hub reads in it, what people read in it, and that no name can break it."""

import ast
import re
import shlex
from dataclasses import replace

import pytest
import torch
import yaml

from actmaps.maps import ActMap, ActMapMetadata, AffineMap
from actmaps.maps.model_card import model_card

METADATA = ActMapMetadata(
    name="ink",
    description="Wet ink on paper.",
    method="mean",
    positions=None,
    support=(0.01, 0.99),
    timesteps=(0.0, 0.15, 0.3, 3 * 0.15),
    window=(0.0, 0.6),
    seed=7,
    architecture={"unet": "UNet2DConditionModel"},
    model_name="org/model",
    n_source=32,
    n_target=31,
    prompts_hash="c0ffee",
    recommended_strength=0.8,
    presets=("ink-wash", "sketch"),
    costs={"unet.a": (2.0, 0.25), "unet.b": (1.0, 0.25)},
    libraries={"torch": "2.13.0"},
    licence="Apache-2.0",
    created="2026-11-25T00:00:00+00:00",
)


def make(sites=("unet.a", "unet.b"), **changes):
    identity = AffineMap(torch.ones(600), torch.zeros(600))
    return ActMap(dict.fromkeys(sites, identity), replace(METADATA, **changes))


def front_matter(card):
    head, start, _ = card.partition("---\n")[2].partition("\n---\n")
    assert card.startswith("---\n")
    assert start
    return yaml.safe_load(head)


def body(card):
    return card.split("\n---\n", 1)[1]


def rows(card):
    """First to second column of every table row."""
    found = re.findall(r"^\| (.*?) \| (.*) \|$", card, re.M)
    return {key.strip("`"): value for key, value in found}


def code(card, language):
    return re.search(rf"^```{language}\n(.*?)\n```$", card, re.M | re.S)[1]


# What the hub reads --------------------------------------------------------------------------------------------------


def test_the_front_matter_holds_the_facts():
    assert front_matter(model_card(make(), "user/ink")) == {
        "license": "apache-2.0",
        "base_model": "org/model",
        "base_model_relation": "adapter",
        "library_name": "actmaps",
        "pipeline_tag": "text-to-image",
        "tags": ["activation-transport", "actmaps", "text-to-image"],
    }


@pytest.mark.parametrize("name", ["demo", "SDXL", "StableDiffusionACTPipeline", "", "a/b/c", "./model"])
def test_a_model_that_is_on_no_hub_is_no_base_model(name):
    assert "base_model" not in front_matter(model_card(make(model_name=name), "user/ink"))


def test_the_callers_base_model_wins():
    card = model_card(make(), "user/ink", base_model="other/model")
    assert front_matter(card)["base_model"] == "other/model"
    assert 'from_pretrained("other/model")' in card


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("", {}),
        ("CC0-1.0", {"license": "cc0-1.0"}),
        ("Mine: all of it\nreally", {"license": "other", "license_name": "Mine: all of it\nreally"}),
    ],
)
def test_a_licence_that_the_hub_does_not_know_is_named(licence, expected):
    card = model_card(make(licence=licence), "user/ink")
    found = {key: value for key, value in front_matter(card).items() if key.startswith("license")}
    assert found == expected
    assert ("## Licence" in card) == bool(licence)


@pytest.mark.parametrize(
    ("sites", "architecture", "task", "pipeline"),
    [
        (["unet.down.transformer_blocks.0.norm1"], {"unet": "UNet2DConditionModel"}, "text-to-image", "StableDiffusion"),
        (["unet.down.transformer_blocks.9.norm1"], {"unet": "UNet2DConditionModel"}, "text-to-image", "StableDiffusionXL"),
        (["unet.down.transformer_blocks.1.norm1"], {"unet": "UNetModel"}, "text-to-image", "StableDiffusionXL"),
        (["text_encoder_2.norm"], {"unet": "UNet2DConditionModel"}, "text-to-image", "StableDiffusionXL"),
        (["transformer.norm"], {"transformer": "SD3Transformer2DModel"}, "text-to-image", "StableDiffusion3"),
        (["transformer.norm"], {"transformer": "FluxTransformer2DModel"}, "text-to-image", "Flux"),
        (["transformer.norm"], {"transformer": "NewTransformer2DModel"}, "text-to-image", None),
        (["model.layers.0.norm"], {"model": "Gemma3ForCausalLM"}, "text-generation", "TextGeneration"),
        (["model.h.0.norm"], {"model": "GPT2LMHeadModel"}, "text-generation", "TextGeneration"),
        (["model.norm"], {"model": "Classifier"}, None, None),
    ],
)  # fmt: skip
def test_task_and_pipeline_follow_from_the_model(sites, architecture, task, pipeline):
    card = model_card(make(sites, architecture=architecture, costs={}), "user/ink")
    assert front_matter(card).get("pipeline_tag") == task
    assert (task in front_matter(card)["tags"]) == (task is not None)
    assert ("ComfyUI" in card) == (task == "text-to-image")
    lines = code(card, "python").splitlines()
    expected = "ActMap, steer" if pipeline is None else f"{pipeline}ACTPipeline"
    assert lines[0] == f"from actmaps import {expected}"
    assert ("```bash" in card) == (pipeline is not None)


# What people read ----------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_map_is():
    card = body(model_card(make(), "user/ink"))
    assert card.splitlines()[1] == "# ink"
    assert "Wet ink on paper." in card
    assert "An act map of org/model: one scale and one shift for each of 1,200 units at 2 sites (2 in unet)." in card
    assert "**0.8 is the recommended strength**" in card
    assert "Apache-2.0, of the map." in card


def test_tables_hold_how_it_was_fitted():
    found = rows(model_card(make(), "user/ink"))
    expected = {
        "prompts": "32 source and 31 target prompts",
        "presets": "ink-wash, sketch",
        "hash of the prompts": "c0ffee",
        "transport cost": "3 before the map, 0.5 after",
        "created": "2026-11-25T00:00:00+00:00",
        "method": "mean",
        "positions": "all",
        "support": "0.01, 0.99",
        "causal": "yes",
        "transport_target": "no",
        "seed": "7",
        "timesteps": "0, 0.15, 0.3, 0.45",
        "window": "0, 0.6",
        "rows": "cond",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "scope" not in found


def test_a_language_map_shows_its_scope_and_nothing_of_pictures():
    card = model_card(
        make(["model.a"], architecture={"model": "LlamaForCausalLM"}, scope="last", costs={}), "user/kind"
    )
    found = rows(card)
    assert found["scope"] == "last"
    assert not {"timesteps", "window", "latents", "rows", "spatial"} & set(found)
    assert "actmaps generate --model org/model --map user/kind" in card


def test_examples_load_the_map_by_its_id_and_run_the_first_sample():
    card = model_card(make(), "user/ink", samples=["a fox's den", "a harbor"], picture="preview.png")
    assert code(card, "python").splitlines() == [
        "from actmaps import StableDiffusionACTPipeline",
        "",
        'pipe = StableDiffusionACTPipeline.from_pretrained("org/model")',
        'pipe.load_act_map("user/ink")',
        'pipe("a fox\'s den", act_strength=0.8).images[0].save("picture.png")',
    ]
    assert shlex.split(code(card, "bash")) == [
        *("actmaps", "sweep", "--model", "org/model", "--map", "user/ink", "--prompt", "a fox's den")
    ]
    assert "- a fox's den\n- a harbor\n" in card
    assert "![What the map does](preview.png)" in card


def test_another_filename_is_named_wherever_the_map_is_loaded():
    card = model_card(make(), "user/ink", filename="wet.safetensors")
    assert 'pipe.load_act_map("user/ink", filename="wet.safetensors")' in card
    assert code(card, "bash").splitlines()[0] == "hf download user/ink wet.safetensors --local-dir ."
    assert "--map wet.safetensors" in card
    assert "put `wet.safetensors` into" in card


def test_without_picture_samples_and_metadata_their_sections_are_left_out():
    card = model_card(ActMap({"model.a": AffineMap.identity(1)}), "user/ink")
    assert not re.search(r"!\[|## Prompts|## Licence|hash|presets|transport cost", card)
    assert "\n\n\n" not in card
    compile(code(card, "python"), "card", "exec")


# Names that would break it -------------------------------------------------------------------------------------------

ODD = "a|b \"c\" 'd'\n\n# <script>*e*</script> `f`\\ [g](h) ${x}: - é 猫"


def test_odd_texts_break_neither_yaml_nor_tables_nor_code():
    odd = make(name=ODD, description=ODD, licence=ODD, presets=(ODD, "b"), model_name=ODD, prompts_hash=ODD)
    card = model_card(odd, "user/ink", samples=[ODD, f"```\n{ODD}"], base_model="org/model")
    assert front_matter(card)["license_name"] == ODD
    text = " ".join(ODD.split())
    assert [ast.literal_eval(found) for found in re.findall(r"^pipe\((\".*\"), act", card, re.M)] == [text]
    assert shlex.split(code(card, "bash"))[-1] == text
    # Every table row has two cells, every heading is ours, and no HTML or emphasis of the texts is left.
    table = [re.sub(r"\\.", "", line) for line in body(card).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {3}
    outside = re.sub(r"^```.*?^```$", "", body(card), flags=re.M | re.S)
    assert len(re.findall(r"^#+ ", outside, re.M)) == 5
    plain = re.sub(r"\\.", "", outside)
    assert "<" not in plain
    assert "script*" not in plain
    assert len(re.findall("^```", card, re.M)) == 4


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("- a list", "\\- a list"),
        ("1. a list", "1\\. a list"),
        ("---", "\\---"),
        ("2026-11-25", "2026-11-25"),
        ("-5 degrees", "-5 degrees"),
        ("=== wide", "\\=== wide"),
    ],
)
def test_a_description_begins_no_list_and_no_rule(text, shown):
    assert f"\n\n{shown}\n\n" in model_card(make(description=text), "user/ink")

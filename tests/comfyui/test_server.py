"""Our pack on a live ComfyUI server, driven as the browser drives it."""

import copy
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from actmaps.demo import STYLES, load_judges
from actmaps.maps import ActMap, AffineMap

REPOSITORY = Path(__file__).parents[2]
WORKFLOWS = {path.stem: json.loads(path.read_text()) for path in (REPOSITORY / "workflows" / "api").glob("*.json")}
NEEDS_CHECKPOINTS = {"sdxl-style", "flux-style"}


def titled(prompt, title):
    return next(key for key, node in prompt.items() if node["_meta"]["title"] == title)


def of_kind(prompt, kind):
    return [key for key, node in prompt.items() if node["class_type"] == kind]


def only(prompt, *ends):
    """The part of a graph that `ends` need."""
    kept, waiting = {}, list(ends)
    while waiting:
        key = waiting.pop()
        if key not in kept:
            kept[key] = copy.deepcopy(prompt[key])
            waiting += [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)]
    return kept


def failure(server, prompt):
    """What the server says of a prompt that fails."""
    result = server.run(prompt)
    assert result.error is not None
    return result.error["exception_message"]


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture(scope="module")
def judges():
    return load_judges()


@pytest.fixture
def compare():
    """The template, fitting on fewer prompts."""
    prompt = copy.deepcopy(WORKFLOWS["fit-and-compare"])
    (preset,) = of_kind(prompt, "ACTPresetPrompts")
    prompt[preset]["inputs"]["count"] = 16
    return prompt


# What the browser is told


def test_all_nodes_are_there_and_explain_themselves(server):
    ours = {kind: info for kind, info in server.get("/object_info").items() if info["category"] == "AcT Maps"}
    assert set(ours) == {
        "ACTFitMap", "ACTApplyMap", "ACTLoadMap", "ACTSaveMap", "ACTBlendMaps", "ACTPresetPrompts", "ACTInspectMap", "ACTDemoModel",
    }  # fmt: skip
    for kind, info in ours.items():
        assert info["description"], kind
        for inputs in (info["input"].get("required", {}), info["input"].get("optional", {})):
            assert all(spec[1].get("tooltip") for spec in inputs.values()), kind
        assert all(info["output_tooltips"]), kind
    fit = ours["ACTFitMap"]["input"]["required"]
    assert {name for name, spec in fit.items() if spec[1].get("advanced")} == {
        "sampler_name", "scheduler", "rows", "latents", "pooling", "positions", "support", "batch_size", "site_pattern", "offload",
    }  # fmt: skip
    apply = ours["ACTApplyMap"]["input"]["required"]
    later = ours["ACTApplyMap"]["input"]["optional"]  # behind the others, so that saved graphs keep their values
    assert [name for name, spec in later.items() if spec[0] == "STRING"] == ["strength_curve", "block_strengths"]
    assert all(
        later[name][1]["advanced"] and later[name][1]["default"] == ""
        for name in ("strength_curve", "block_strengths")
    )
    assert [apply[name][1]["display"] for name in ("strength_model", "strength_clip", "end_percent")] == ["slider"] * 3


def test_help_pages_pictures_templates_and_translations_are_served(server):
    for kind in ("ACTFitMap", "ACTApplyMap", "ACTDemoModel"):
        assert server.raw(f"/extensions/AcT-Maps/docs/{kind}.md").startswith(b"# ")
    assert server.raw("/extensions/AcT-Maps/docs/images/strengths.png")[1:4] == b"PNG"
    assert set(server.get("/workflow_templates")["AcT-Maps"]) == set(WORKFLOWS)
    translations = server.get("/i18n")
    assert {"en", "de", "zh"} <= set(translations)
    assert translations["de"]["nodeDefs"]["ACTFitMap"]["display_name"] == "AcT-Map anpassen"
    for kind, english in translations["en"]["nodeDefs"].items():
        node = server.get("/object_info")[kind]
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        assert english["display_name"] == node["display_name"]
        assert english["description"] == node["description"]
        assert {name: item["tooltip"] for name, item in english.get("inputs", {}).items()} == {
            name: spec[1]["tooltip"] for name, spec in inputs.items()
        }


# Templates


@pytest.mark.parametrize("name", sorted(set(WORKFLOWS) - NEEDS_CHECKPOINTS))
def test_every_template_runs_on_the_demo_model(server, name):
    prompt = WORKFLOWS[name]
    result = server.run(prompt)
    assert result.error is None
    assert {key for key in prompt if prompt[key]["class_type"] in ("PreviewImage", "PreviewAny", "ACTSaveMap")} <= set(
        result.outputs
    )


@pytest.mark.parametrize("name", sorted(NEEDS_CHECKPOINTS))
def test_templates_for_other_models_lack_nothing_but_those(server, name):
    refused = server.validate(WORKFLOWS[name])
    kinds = {WORKFLOWS[name][key]["class_type"] for key in refused["node_errors"]}
    assert kinds <= {"CheckpointLoaderSimple", "UNETLoader", "DualCLIPLoader", "VAELoader"}
    for errors in refused["node_errors"].values():
        assert {error["type"] for error in errors["errors"]} == {"value_not_in_list"}


# What the pictures show


def test_the_steered_branch_has_the_style_and_the_plain_one_does_not_change(server, compare, judges):
    plain, steered = (
        next(k for k in of_kind(compare, "PreviewImage") if compare[k]["_meta"]["title"] == t)
        for t in ("Plain", "Steered")
    )
    for sampler in of_kind(compare, "KSampler"):
        compare[sampler]["inputs"]["seed"] = 11
    (latent,) = of_kind(compare, "EmptyLatentImage")
    compare[latent]["inputs"]["batch_size"] = 8
    both = server.run(compare)
    assert both.error is None
    for scale in of_kind(compare, "ImageScale"):
        assert compare[scale]["inputs"]["width"] == 256
    small = {key: [image.resize((64, 64)) for image in server.images(both, key)] for key in (plain, steered)}
    style = STYLES.index("pop art")
    shares = {key: (judges.style(images).argmax(1) == style).float().mean().item() for key, images in small.items()}
    assert shares[steered] >= 0.75
    assert shares[plain] <= 0.25
    alone = server.run(only(compare, plain))
    assert np.array_equal(pixels(server.images(alone, plain)), pixels(server.images(both, plain)))


def test_a_negation_at_guidance_1_changes_what_a_negative_prompt_cannot(server):
    prompt = copy.deepcopy(WORKFLOWS["negation-cfg-1"])
    pictures = {
        title: next(k for k in of_kind(prompt, "PreviewImage") if prompt[k]["_meta"]["title"] == title)
        for title in ("Plain", "Without the hat")
    }
    first = server.run(prompt)
    negative = titled(prompt, "Negative prompt (no effect at cfg 1)")
    prompt[negative]["inputs"]["text"] = "sunglasses"
    second = server.run(prompt)
    plain = [pixels(server.images(run, pictures["Plain"])) for run in (first, second)]
    assert np.array_equal(*plain)
    steered = pixels(server.images(first, pictures["Without the hat"])).astype(float)
    # The hat stands in the top quarter of the picture, dark on light in every style of these seeds.
    assert np.abs(steered - plain[0])[:, :64].mean() > 20


# The cache


def test_a_map_is_fitted_once_until_its_inputs_change(server, compare):
    (fit,), (apply,) = of_kind(compare, "ACTFitMap"), of_kind(compare, "ACTApplyMap")
    compare[fit]["inputs"]["seed"] = 77
    assert fit in server.run(compare).executed
    again = server.run(compare)
    assert fit in again.cached
    assert again.executed == [] or fit not in again.executed
    compare[apply]["inputs"]["strength_model"] = 0.3
    slider = server.run(compare)
    assert fit in slider.cached
    assert apply in slider.executed
    compare[fit]["inputs"]["seed"] = 78
    assert fit in server.run(compare).executed


# What goes wrong


def test_an_interrupted_fit_leaves_the_server_healthy(server, compare):
    plain = next(k for k in of_kind(compare, "PreviewImage") if compare[k]["_meta"]["title"] == "Plain")
    (fit,), (preset,) = of_kind(compare, "ACTFitMap"), of_kind(compare, "ACTPresetPrompts")
    before = pixels(server.images(server.run(only(compare, plain)), plain))
    long = copy.deepcopy(compare)
    long[preset]["inputs"]["count"] = 256
    long[fit]["inputs"] |= {"seed": 5, "timesteps": 8, "sites": "text encoder and denoiser"}
    stopped = []

    def interrupt(result):
        in_fit = [value / total for node, value, total in result.progress if node == fit]
        if in_fit and in_fit[-1] > 0.2 and not stopped:
            stopped.append(time.monotonic())
            server.interrupt()

    result = server.run(only(long, fit, *of_kind(long, "PreviewAny")), on_progress=interrupt)
    assert result.interrupted
    assert time.monotonic() - stopped[0] < 5
    short = server.run(compare)
    assert short.error is None
    for sampler in of_kind(compare, "KSampler"):
        compare[sampler]["inputs"]["steps"] = 19  # not from the cache
    server.run(only(compare, plain))
    for sampler in of_kind(compare, "KSampler"):
        compare[sampler]["inputs"]["steps"] = 20
    after = pixels(server.images(server.run(only(compare, plain)), plain))
    assert np.array_equal(before, after)


@pytest.fixture(scope="module")
def maps(server):
    folder = server.base / "models" / "act_maps"
    unit = AffineMap(torch.ones(1), torch.ones(1))
    good = ActMap({"unet.mid_block.resnets.0.norm1": AffineMap(torch.ones(192), torch.ones(192))})
    good.save(folder / "good.safetensors")
    (folder / "truncated.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:-100])
    save_file({"lora_unet_mid.lora_up.weight": torch.ones(2, 2)}, folder / "lora.safetensors")
    ActMap({"transformer.transformer_blocks.0.norm2": unit}).save(folder / "flux.safetensors")
    ActMap({"unet.mid_block.resnets.0.norm1": unit}).save(folder / "width.safetensors")
    server.get("/object_info/ACTLoadMap")
    return folder


def loaded(compare, name):
    """The template with a map from a file in place of the fit."""
    (apply,) = of_kind(compare, "ACTApplyMap")
    plain, steered = (
        next(k for k in of_kind(compare, "PreviewImage") if compare[k]["_meta"]["title"] == t)
        for t in ("Plain", "Steered")
    )
    prompt = copy.deepcopy(compare)
    prompt["100"] = {"class_type": "ACTLoadMap", "inputs": {"map_name": name}, "_meta": {"title": "Load"}}
    prompt[apply]["inputs"]["act_map"] = ["100", 0]
    return prompt, plain, steered


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("truncated.safetensors", "ACTLoadMap", ["truncated.safetensors", "again"]),
        ("lora.safetensors", "ACTLoadMap", ["lora.safetensors", "act map"]),
        (
            "flux.safetensors",
            "ACTApplyMap",
            ["act map", "transformer.transformer_blocks.0.norm2", "fitted on this kind of model"],
        ),
        ("width.safetensors", "KSampler", ["fitted on 1 units", "has 192", "another model"]),
    ],
)
def test_a_bad_map_is_an_error_that_says_what_to_do_and_the_other_branch_renders(
    server, compare, maps, name, kind, words
):
    prompt, plain, steered = loaded(compare, name)
    result = server.run(only(prompt, steered))
    assert result.error is not None
    assert result.error["node_type"] == kind
    for word in words:
        assert word in result.error["exception_message"]
    assert server.images(server.run(only(prompt, plain)), plain)


def test_a_good_map_from_a_file_steers(server, compare, maps):
    prompt, plain, steered = loaded(compare, "good.safetensors")
    result = server.run(only(prompt, plain, steered))
    assert result.error is None
    assert not np.array_equal(pixels(server.images(result, plain)), pixels(server.images(result, steered)))


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "C:\\escaped", "a\x00b", ""])
def test_names_cannot_leave_the_folder(server, compare, maps, name):
    prompt, _, steered = loaded(compare, f"{name}.safetensors")
    assert "there is no act map" in failure(server, only(prompt, steered))
    save, _, _ = loaded(compare, "good.safetensors")
    save["101"] = {
        "class_type": "ACTSaveMap", "inputs": {"act_map": ["100", 0], "filename": name, "overwrite": True}, "_meta": {"title": ""},
    }  # fmt: skip
    assert "is no name for an act map" in failure(server, only(save, "101"))
    assert not list(server.base.rglob("*escaped*"))
    assert not Path("/tmp/escaped.safetensors").exists()


def test_the_log_has_no_complaint_about_the_pack(server):
    lines = server.log.read_text().splitlines()
    assert not [line for line in lines if "AcT-Maps" in line and ("FAILED" in line or "Error" in line)]

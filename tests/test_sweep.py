"""Sweeps: which picture stands where."""

import numpy as np
import pytest
import torch

import tiny_models
from actmaps.evaluation import sweep
from actmaps.evaluation.sweep import preset_sweep, strength_sweep
from actmaps.maps import ActMap, ActMapMetadata, AffineMap
from actmaps.maps.presets import Preset, PromptTemplates
from actmaps.pipelines import StableDiffusionACTPipeline

STEPS = {"num_inference_steps": 2}
PLAIN = PromptTemplates(("{subject}",))


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionACTPipeline(**tiny_models.components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def act_map():
    by = torch.zeros(16)
    by[0] = 2.0
    return ActMap({"unet.conv_norm_out": AffineMap(torch.ones(16), by)}, ActMapMetadata(name="ink", rows="both"))


def picture(pipe, prompt, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipe(prompt, generator=generator, **STEPS, **options).images[0], int)


def differ(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


def test_a_row_keeps_its_prompt_and_seed_and_a_column_its_strength(pipe, act_map):
    name = pipe.load_act_map(act_map)
    rows = strength_sweep(pipe, ["a cat", "a dog"], [0.0, 1.5], seed=7, **STEPS)
    for row, (prompt, seed) in zip(rows, (("a cat", 7), ("a dog", 8)), strict=True):
        for drawn, strength in zip(row, (0.0, 1.5), strict=True):
            assert differ(drawn, picture(pipe, prompt, seed, act_strength=strength)) <= 1
    assert differ(*rows[0]) > 1
    pipe.delete_act_maps(name)


@pytest.fixture
def drawn(monkeypatch):
    """What `preset_sweep` hands to the grid."""
    calls = []

    def record(rows, row_labels, column_labels, **texts):
        calls.append((rows, row_labels, column_labels, texts))
        return rows[0][0]

    monkeypatch.setattr(sweep, "draw_grid", record)
    return calls


def test_a_style_is_compared_with_naming_it(pipe, act_map, drawn):
    preset = Preset("ink", "style", PLAIN, PromptTemplates(("{subject}, {tags}",), ("ink", "wash"), 0, 1))
    preset_sweep(pipe, preset, act_map, ["cat"], strengths=(0.0, 1.0), seed=3, **STEPS)
    (((unsteered, steered, asked),), labels, columns, texts) = drawn[0]
    assert labels == ["cat"]
    assert columns == ["0\nunsteered", "1", "“ink”\nin the prompt"]
    assert texts["apart"] == 1
    assert differ(unsteered, picture(pipe, "cat", 3)) <= 1
    assert differ(steered, unsteered) > 1
    assert differ(asked, picture(pipe, "cat, ink", 3)) <= 1


def test_a_negation_is_compared_with_a_negative_prompt_and_with_leaving_it_out(pipe, act_map, drawn):
    preset = Preset("no-hat", "negation", PromptTemplates(("{subject} with {tags}",), ("a hat",), 1, 0), PLAIN)
    preset_sweep(pipe, preset, act_map, ["cat"], strengths=(0.0,), seed=3, **STEPS)
    (((unsteered, negative, without),), labels, columns, _) = drawn[0]
    assert labels == ["cat with a hat"]
    assert columns == ["0\nunsteered", "“a hat” as\nnegative prompt", "without it\nin the prompt"]
    assert differ(unsteered, picture(pipe, "cat with a hat", 3)) <= 1
    assert differ(negative, picture(pipe, "cat with a hat", 3, negative_prompt="a hat")) <= 1
    assert differ(without, picture(pipe, "cat", 3)) <= 1


def test_the_pipeline_is_left_without_the_map(pipe, act_map, drawn):
    preset = Preset("ink", "style", PLAIN, PromptTemplates(("{subject}, ink",)))
    with pytest.raises(TypeError, match="must be a number"):
        preset_sweep(pipe, preset, act_map, ["cat"], strengths=["high"], **STEPS)
    assert pipe.get_list_act_maps() == {}

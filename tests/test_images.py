"""Judging of images: numbers worked out by hand, and pictures that depend on prompt and seed only."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tiny_models
from actmaps.evaluation.images import Sampling, draw, monotonicity, score_concept, score_style
from actmaps.pipelines import StableDiffusionACTPipeline


class PlaneJudges:
    """Judges of pictures whose first pixel tells everything: (angle of the content in degrees, style number, -)."""

    styles = ("flat", "ink")
    angles = {"cat": 0.0, "cat with a hat": 30.0, "dog": 90.0, "dog with a hat": 60.0}  # noqa: RUF012

    def style(self, images):
        ink = torch.from_numpy(images[:, 0, 0, 1] / 100.0)
        return torch.stack([1 - ink, ink], dim=1)

    def embed_images(self, images):
        return self._unit(images[:, 0, 0, 0].astype(float))

    def embed_captions(self, captions):
        return self._unit(np.array([self.angles[caption] for caption in captions]))

    @staticmethod
    def _unit(degrees):
        radians = torch.from_numpy(np.deg2rad(degrees))
        return torch.stack([radians.cos(), radians.sin()], dim=1)


def pictures(*pixels):
    images = np.zeros((len(pixels), 2, 2, 3), dtype=np.uint8)
    images[:, 0, 0] = pixels
    return images


def test_style_scores():
    scores = score_style(PlaneJudges(), pictures((0, 90, 0), (60, 20, 0)), ["cat", "dog"], "ink")

    assert scores.share == 0.5  # 90 % ink, and 20 % ink
    assert scores.probability == pytest.approx(0.55)
    assert scores.content == pytest.approx((1 + math.cos(math.radians(30))) / 2)
    assert scores.recognised == 1.0  # two subjects are always among the first five


def test_a_picture_shows_a_concept_where_the_caption_with_it_fits_better():
    images = pictures((29, 0, 0), (10, 0, 0), (61, 0, 0), (80, 0, 0))
    subjects = ["cat", "cat", "dog", "dog"]
    scores = score_concept(PlaneJudges(), images, subjects, [f"{s} with a hat" for s in subjects])

    assert scores.share == 0.5  # 29 degrees are nearer to a cat with a hat (30) than to a cat (0); 10 are not


def test_unknown_styles_are_refused():
    with pytest.raises(ValueError, match="know no style 'oil', only flat, ink"):
        score_style(PlaneJudges(), pictures((0, 0, 0)), ["cat"], "oil")


def test_monotonicity_is_a_rank_correlation():
    assert monotonicity([0, 0.5, 1], [0.1, 0.11, 0.9]) == pytest.approx(1)
    assert monotonicity([0, 0.5, 1], [0.9, 0.5, 0.1]) == pytest.approx(-1)
    assert math.isnan(monotonicity([0, 0.5, 1], [0.2, 0.2, 0.2]))


def test_pictures_depend_on_prompt_and_seed_only():
    pipe = StableDiffusionACTPipeline(**tiny_models.components())
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a cat", "a dog", "a house"]
    one, three = (draw(pipe, prompts, Sampling(2, batch_size=size)) for size in (1, 3))

    assert one.shape == (3, 16, 16, 3)
    assert one.dtype == np.uint8
    assert np.abs(one.astype(int) - three.astype(int)).max() <= 1  # batches round differently
    other = draw(pipe, prompts, Sampling(2, seed=5))
    assert np.abs(one.astype(int) - other.astype(int)).max() > 1

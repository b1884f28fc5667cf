"""A CLIP as judge of pictures: its numbers are those that transformers computes and those worked out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer

import tiny_clip
import tiny_models
from actmaps.evaluation.clip import ClipJudge

CAPTIONS = ["a cat on a chair", "two dogs", "an old house by the sea"]
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return tiny_clip.save_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def judge(clip):
    return ClipJudge.from_pretrained(clip, "cpu")


def pixels_of(pictures, mean, deviation, crop):
    """Resized with Pillow, cut, and normalised, step by step."""
    found = []
    for picture in pictures:
        size = (38, 32) if crop else (32, 32)  # 48 x 40 with the shorter side at 32
        resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), float)
        left = (size[0] - 32) // 2
        found.append(((resized[:, left : left + 32] / 255 - mean) / deviation).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(found)).float()


CLIP_PIXELS = {
    "mean": np.array([0.48145466, 0.4578275, 0.40821073]),
    "deviation": np.array([0.26862954, 0.26130258, 0.27577711]),
    "crop": True,
}


def forward(folder, pictures, texts, **padding):
    """What transformers' own forward gives for the pictures and texts."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pixels = pixels_of(pictures, **(CLIP_PIXELS if model.config.model_type == "clip" else padding.pop("pixels")))
    with torch.no_grad():
        return model(**tokenizer(list(texts), return_tensors="pt", **padding), pixel_values=pixels)


def test_the_clip_score_is_the_cosine_of_picture_and_caption(clip, judge):
    found = forward(clip, PICTURES, CAPTIONS, padding=True)
    pictures, texts = found.image_embeds.double().numpy(), found.text_embeds.double().numpy()
    cosines = (pictures * texts).sum(1) / np.linalg.norm(pictures, axis=1) / np.linalg.norm(texts, axis=1)
    assert judge.clip_score(judge.embed_images(PICTURES), CAPTIONS).tolist() == pytest.approx(cosines, abs=1e-5)
    assert np.ptp(cosines) > 0.01


def test_the_probability_is_the_softmax_of_the_models_own_logits(clip, judge):
    logits = forward(clip, PICTURES, ["A picture of ink.", "A picture of something."], padding=True).logits_per_image
    probability = judge.probability(judge.embed_images(PICTURES), "ink")
    assert probability.tolist() == pytest.approx(logits.softmax(-1)[:, 0].tolist(), abs=1e-5)
    assert probability.std() > 1e-3


def test_a_siglip_judges_too(siglip):
    half = np.array([0.5, 0.5, 0.5])
    logits = forward(
        siglip,
        PICTURES,
        ["A picture of ink.", "A picture of something."],
        padding="max_length",
        max_length=tiny_clip.TOKENS,
        pixels={"mean": half, "deviation": half, "crop": False},
    ).logits_per_image
    judge = ClipJudge.from_pretrained(siglip, "cpu")
    probability = judge.probability(judge.embed_images(PICTURES), "ink")
    assert probability.tolist() == pytest.approx(logits.softmax(-1)[:, 0].tolist(), abs=1e-5)


def test_share_similarity_and_relative_score(judge):
    ink, something, other = judge.embed_captions(["A picture of ink.", "A picture of something.", "a boat"])
    seen, unsteered = torch.stack([ink, ink, something]), torch.stack([ink, something, other])
    scores = judge.scores(seen, CAPTIONS, "ink", unsteered)
    assert scores.share == pytest.approx(2 / 3)
    assert scores.probability == pytest.approx(float(judge.probability(seen, "ink").mean()))
    kept = [1.0, float(ink @ something), float(something @ other)]
    assert scores.image_similarity == pytest.approx(np.mean(kept), abs=1e-6)
    before = float(judge.clip_score(unsteered, CAPTIONS).mean())
    assert scores.clip_score == pytest.approx(scores.relative_clip_score * before, abs=1e-6)
    assert judge.scores(unsteered, CAPTIONS, "ink", unsteered).relative_clip_score == 1


def test_batches_and_kinds_of_pictures_make_no_difference(clip, judge):
    whole = judge.embed_images(PICTURES)
    assert whole.shape == (3, 12)
    assert torch.allclose(whole.norm(dim=1), torch.ones(3))
    in_pairs = ClipJudge.from_pretrained(clip, "cpu", batch_size=2)
    assert torch.allclose(in_pairs.embed_images([Image.fromarray(picture) for picture in PICTURES]), whole, atol=1e-6)
    assert torch.allclose(in_pairs.embed_captions(CAPTIONS), judge.embed_captions(CAPTIONS), atol=1e-6)


def test_transparent_and_grey_pictures_are_looked_at_in_colour(judge):
    grey = Image.fromarray(PICTURES[0]).convert("L")
    assert torch.equal(judge.embed_images([grey]), judge.embed_images([grey.convert("RGB")]))


def test_long_captions_are_cut(judge):
    words = "a very long caption " * 20
    assert torch.equal(*judge.embed_captions([words, words + "that goes on"]))


def test_weights_in_half_precision_judge_alike(clip, judge):
    half = ClipJudge.from_pretrained(clip, "cpu", torch.bfloat16)
    found = half.embed_images(PICTURES)
    assert found.dtype == torch.float32
    assert torch.allclose(found, judge.embed_images(PICTURES), atol=0.03)


def test_pictures_of_another_kind_are_refused(judge):
    with pytest.raises(ValueError, match=r"must be uint8 \(n, H, W, 3\), got float64 \(3, 40, 48, 3\)"):
        judge.embed_images(PICTURES / 255)


def test_each_picture_needs_a_caption_and_an_unsteered_picture(judge):
    seen = judge.embed_images(PICTURES)
    with pytest.raises(ValueError, match="3 pictures, 2 captions, 3 unsteered"):
        judge.scores(seen, CAPTIONS[:2], "ink", seen)


def test_models_that_do_not_compare_are_refused(tmp_path):
    tokens = tiny_models.tokenizer()
    with pytest.raises(ValueError, match=r"CLIPTextModel has no get_image_features.*take a CLIP or a SigLIP"):
        ClipJudge(tiny_models.text_encoder(len(tokens)), tokens, None)

"""The demo data set: names, splits, captions and styles. No network, no rendered images."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from actmaps.demo import STYLES, dataset, subjects
from actmaps.demo.styles import RENDER_SIZE, STYLE_TABLE


def some_record(style=0, accessory=None, **changes):
    fields = {
        "label": "red apple",
        "hexcode": "1F34E",
        "synonyms": ("apple",),
        "tags": (),
        "group": "food",
        "subgroup": "food-fruit",
        "split": "train",
        "accessories": (),
    }
    return dataset.Record(0, dataset.Concept(**(fields | changes)), style, accessory, "train")


@pytest.fixture
def render():
    """A red disc with a green leaf and a black spot, transparent around."""
    picture = Image.new("RGBA", (RENDER_SIZE, RENDER_SIZE))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((40, 60, 216, 236), fill=(220, 40, 60, 255))
    pen.polygon(((128, 60), (180, 20), (150, 64)), fill=(60, 160, 60, 255))
    pen.ellipse((90, 110, 120, 140), fill=(20, 20, 20, 255))
    return picture


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("woman: red hair", "woman with red hair"),
        ("man: bald", "bald man"),
        ("woman: beard", "woman with a beard"),
        ("man in tuxedo", "man in tuxedo"),
        ("T-Rex", "t-rex"),
        ("couple with heart: man, man", "couple with heart man man"),
        ("Santa Claus’s “hat”!", "santa claus's hat"),
    ],
)
def test_labels_read_as_captions(label, expected):
    assert dataset.natural_label(label) == expected


def test_subjects_come_without_rendered_images_and_splits_are_disjoint():
    train, held_out = subjects("train"), subjects("held_out")
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train)
    assert len(train) > 1000
    assert 0.07 < len(held_out) / (len(train) + len(held_out)) < 0.13
    assert "red apple" in train


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'held_out'"):
        subjects("test")


def test_shipped_splits_are_what_the_hash_says_today():
    """The list that ships and the code that rebuilds the data set agree."""
    for concept in dataset.known_concepts():
        assert dataset.concept_split(concept.label) == concept.split


def test_held_out_pairs_are_a_tenth_in_every_style():
    labels = subjects("train")
    for style in STYLES:
        share = sum(dataset.pair_held_out(label, style) for label in labels) / len(labels)
        assert 0.07 < share < 0.13


def test_no_flags_skin_tones_or_duplicates_among_the_subjects():
    concepts = dataset.known_concepts()
    assert not [c.label for c in concepts if "skin tone" in c.label or c.label.startswith("flag:")]
    assert max(Counter(c.hexcode for c in concepts).values()) == 1


def test_caption_mix():
    rng = random.Random(0)
    record = some_record(style=STYLES.index("pixel art"))
    words = {STYLE_TABLE[record.style].phrase, *STYLE_TABLE[record.style].wordings}
    captions = [dataset.sample_caption(record, rng) for _ in range(6000)]
    empty = captions.count("") / len(captions)
    plain = sum(caption in ("red apple", "apple") for caption in captions) / len(captions)
    styled = [caption for caption in captions if any(word in caption for word in words)]
    assert empty == pytest.approx(0.10, abs=0.015)
    assert plain == pytest.approx(0.33, abs=0.025)
    assert len(styled) / len(captions) == pytest.approx(0.57, abs=0.025)
    assert {word for word in words if any(word in caption for caption in styled)} == words


def test_captions_never_name_another_style():
    for index, style in enumerate(STYLE_TABLE):
        own = {style.phrase, *style.wordings}
        others = {word for other in STYLE_TABLE if other is not style for word in (other.phrase, *other.wordings)}
        assert not own & others
        assert dataset.canonical_caption(some_record(style=index)) == f"red apple, {style.phrase}"


def test_accessories_are_part_of_the_subject():
    concept = some_record().concept
    assert dataset.subject_text(concept, "hat") == "red apple with a hat"
    assert dataset.subject_text(concept, "sunglasses") == "red apple with sunglasses"


def test_styles_are_deterministic_and_far_apart(render):
    pictures = {style.phrase: np.asarray(style.draw(render), np.float32) for style in STYLE_TABLE}
    for style in STYLE_TABLE:
        assert pictures[style.phrase].shape == (64, 64, 3)
        np.testing.assert_array_equal(pictures[style.phrase], np.asarray(style.draw(render), np.float32))
    derived = [phrase for phrase in STYLES if phrase not in ("flat cartoon", "glossy 3d", "black and white icon")]
    for first in derived:
        for second in (*derived, "flat cartoon"):
            if first != second:
                assert np.abs(pictures[first] - pictures[second]).mean() > 8, (first, second)


def test_pixel_art_is_made_of_blocks(render):
    picture = np.asarray(STYLE_TABLE[STYLES.index("pixel art")].draw(render))
    blocks = picture.reshape(16, 4, 16, 4, 3)
    np.testing.assert_array_equal(blocks, np.broadcast_to(blocks[:, :1, :, :1], blocks.shape))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) <= 16


def test_accessory_changes_the_picture_and_keeps_the_subject(render):
    pytest.importorskip("resvg_py")
    plain = np.asarray(render, np.int16)
    for accessory in dataset.ACCESSORIES:
        dressed = dataset.add_accessory(render, accessory)
        assert dressed.size == render.size
        values = np.asarray(dressed, np.int16)
        assert np.abs(values - plain).mean() > 4
        red = (values[..., 0] > 200) & (values[..., 1] < 60) & (values[..., 3] > 250)
        assert red.sum() > 3000


class FakeSets:
    def has(self, source, hexcode):
        return not (source == "noto" and hexcode == "B")

    def render(self, source, hexcode):
        picture = Image.new("RGBA", (RENDER_SIZE, RENDER_SIZE))
        ImageDraw.Draw(picture).rectangle((60, 60, 200, 200), fill=(200, 30, len(source) * 5, 255))
        return picture


def test_plan_leaves_out_what_a_set_does_not_draw():
    concepts = [some_record(label="a", hexcode="A").concept, some_record(label="b", hexcode="B").concept]
    records = list(dataset.plan_records(concepts, FakeSets()))
    assert [record.image for record in records] == list(range(len(records)))
    assert {record.style for record in records if record.concept.label == "a"} == set(range(len(STYLES)))
    assert not [r for r in records if r.concept.label == "b" and STYLE_TABLE[r.style].source == "noto"]


def test_held_out_concepts_have_no_training_images():
    held_out = some_record(split="held_out", accessories=("hat",)).concept
    assert {record.split for record in dataset.plan_records([held_out], FakeSets())} == {"held_out_concept"}


def test_an_interrupted_build_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "IconSets", lambda packages: FakeSets())
    monkeypatch.setattr(
        dataset, "build_concepts", lambda packages: [some_record(label=str(n)).concept for n in range(20)]
    )
    monkeypatch.setattr(dataset, "get_context", lambda kind: SerialContext)
    whole = dataset.build(tmp_path / "whole", tmp_path)

    SerialPool.fail_after = 1
    with pytest.raises(KeyboardInterrupt):
        dataset.build(tmp_path / "resumed", tmp_path)
    with pytest.raises(FileNotFoundError, match="no complete data set"):
        dataset.load(tmp_path / "resumed")
    SerialPool.fail_after = None
    resumed = dataset.build(tmp_path / "resumed", tmp_path)

    np.testing.assert_array_equal(resumed.images, whole.images)
    assert resumed.records == whole.records
    assert json.loads((tmp_path / "resumed/index.json").read_text())["styles"] == list(STYLES)


class SerialPool:
    """Stands in for a process pool; stops after `fail_after` chunks as Ctrl-C would."""

    fail_after = None

    def __init__(self, workers, start, arguments):
        start(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def imap(self, function, chunks):
        for number, chunk in enumerate(chunks):
            if number == self.fail_after:
                raise KeyboardInterrupt
            yield function(chunk)


class SerialContext:
    Pool = SerialPool

"""Presets: what they write, where they are found, and what is refused."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from actmaps.demo import dataset
from actmaps.maps import presets
from actmaps.maps.presets import PromptTemplates, Recommendation, load_preset, load_subjects

VALID = """
name = "mine"
kind = "style"
description = "My style."
licence = "CC0-1.0"
subjects = ["a cat", "a house"]

[source]
templates = ["{subject}"]

[target]
templates = ["{subject}, {tags}"]
tags = ["ink", "wash", "brush"]
first_tags = 1
random_tags = 1

[recommended.default]
strength = 0.8

[recommended.StableDiffusionXL]
sites = ["norm1", "norm2"]
support = [0.01, 0.99]
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    folder = tmp_path / "presets"
    folder.mkdir()
    monkeypatch.setenv("ACTMAPS_PRESETS", str(folder))
    return folder


def write(folder: Path, text: str = VALID, name: str = "mine") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


# What presets write --------------------------------------------------------------------------------------------------


def test_prompts_are_one_pair_per_subject(own_folder):
    write(own_folder)
    source, target = load_preset("mine").prompts(["a dog", "a boat"])
    assert source == ["a dog", "a boat"]
    assert [prompt.split(", ")[:2] for prompt in target] == [["a dog", "ink"], ["a boat", "ink"]]
    assert all(prompt.split(", ")[2] in ("wash", "brush") for prompt in target)


def test_equal_seeds_write_equal_prompts_and_others_differ():
    preset = load_preset("demo-neon-sign")
    assert preset.prompts(seed=3) == preset.prompts(seed=3)
    assert preset.prompts(seed=3) != preset.prompts(seed=4)


def test_templates_and_tags_are_used_equally_often():
    templates = PromptTemplates(("{subject}: {tags}", "{tags} {subject}"), ("a", "b", "c", "d"), random_tags=1)
    prompts = templates.write(["x"] * 40, presets._rng(0, "test"))
    assert Counter(":" in prompt for prompt in prompts) == {True: 20, False: 20}
    assert Counter(next(tag for tag in "abcd" if tag in prompt) for prompt in prompts) == dict.fromkeys("abcd", 10)


def test_drawn_tags_of_a_prompt_differ():
    templates = PromptTemplates(("{subject} {tags}",), ("a", "b", "c"), random_tags=2)
    for prompt in templates.write(["x"] * 50, presets._rng(0, "test")):
        tags = prompt.removeprefix("x ").split(", ")
        assert len(set(tags)) == 2


def test_count_draws_that_many_subjects_in_their_order(own_folder):
    write(own_folder)
    subjects = [f"s{i:02}" for i in range(50)]
    source, target = load_preset("mine").prompts(subjects, seed=1, count=10)
    assert len(source) == len(target) == 10
    assert source == sorted(set(source))
    assert source != subjects[:10]


def test_a_subject_with_braces_is_left_alone(own_folder):
    write(own_folder)
    source, _ = load_preset("mine").prompts(["{tags} {0.__class__}"])
    assert source == ["{tags} {0.__class__}"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"subjects": []}, "got no subject"),
        ({"subjects": "a cat"}, "must be a list"),
        ({"count": 3}, "has 2 subjects, cannot draw 3"),
        ({"count": 0}, "cannot draw 0"),
    ],
)
def test_prompts_refuses(own_folder, arguments, problem):
    write(own_folder)
    with pytest.raises(ValueError, match=problem):
        load_preset("mine").prompts(**arguments)


# The built-in presets ------------------------------------------------------------------------------------------------


def test_every_demo_style_has_a_preset_with_its_wordings():
    for style in dataset.STYLE_TABLE:
        preset = load_preset("demo-" + style.phrase.replace(" ", "-"))
        assert preset.kind == "style"
        assert preset.target.tags == (style.phrase, *style.wordings)


def test_every_accessory_has_a_negation():
    for accessory in dataset.ACCESSORIES:
        preset = load_preset(f"demo-no-{accessory}")
        source, target = preset.prompts(["panda"])
        assert preset.kind == "negation"
        assert source == [dataset.subject_text(_concept("panda"), accessory)]
        assert target == ["panda"]


def _concept(label):
    return next(concept for concept in dataset.known_concepts() if concept.label == label)


@pytest.mark.parametrize(("name", "least"), [("emoji", 60), ("emoji-characters", 60)])
def test_subject_lists_are_known_to_the_demo_model_and_not_held_out(name, least):
    subjects = load_subjects(name)
    assert len(subjects) >= least
    assert set(subjects) <= set(dataset.subjects("train"))


# The presets for large models; the others are those of the demo model.
PAPER_STYLES = ("anime", "art-nouveau", "cyberpunk", "impressionism", "sketch", "watercolor")
MORE_STYLES = ("claymation", "film-noir", "ink-wash", "low-poly", "photorealism", "pixel-art", "soft-light", "ukiyo-e")
ANIMALS = {"no-pink-elephant": "a pink elephant", "no-gorilla": "a gorilla", "no-white-bear": "a white bear"}
GENERAL = (*PAPER_STYLES, *MORE_STYLES, *ANIMALS, "no-people", "no-text")
GENERAL_MODELS = "Stable Diffusion, SDXL, SD3, FLUX; not the demo model"
BUILT_IN = sorted(path.stem for path in presets.BUILT_IN.glob("*.toml"))
ARCHITECTURES = ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "default")


def test_the_built_in_presets_are_these():
    assert {name for name in BUILT_IN if not name.startswith("demo-")} == set(GENERAL)
    assert len(BUILT_IN) == len(GENERAL) + 12


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_preset_is_complete(name):
    preset = load_preset(name)
    source, target = preset.prompts(seed=1)
    assert len(source) == len(target) == len(preset.subjects) >= 60
    for side in (source, target):
        assert len(set(side)) == len(side)
    assert not set(source) & set(target)
    assert preset.description.endswith(".")
    assert preset.licence == "Apache-2.0"
    assert preset.models == ("the demo model" if name.startswith("demo-") else GENERAL_MODELS)
    for templates in (preset.source, preset.target, preset.judge or preset.source):
        assert len({tag.lower() for tag in templates.tags}) == len(templates.tags)


@pytest.mark.parametrize("name", [*PAPER_STYLES, *MORE_STYLES])
def test_a_style_gives_every_prompt_its_five_first_tags_and_five_others(name):
    preset = load_preset(name)
    tags = preset.target.tags
    assert preset.kind == "style"
    assert preset.subjects == load_subjects("captions")
    assert 15 <= len(tags) <= 25
    source, target = preset.prompts(seed=2)
    assert source == list(preset.subjects)
    drawn = Counter()
    for caption, prompt in zip(source, target, strict=True):
        first, others = caption + ", " + ", ".join(tags[:5]) + ", ", tags[5:]
        assert prompt.startswith(first)
        rest = prompt.removeprefix(first).split(", ")
        assert len(set(rest)) == 5
        assert set(rest) <= set(others)
        drawn.update(rest)
    assert max(drawn.values()) - min(drawn.values()) <= 5
    assert preset.judge_prompts(seed=2) == source


@pytest.mark.parametrize(("name", "animal"), ANIMALS.items())
def test_an_animal_is_shown_by_the_source_absent_from_the_target_and_negated_by_the_judge(name, animal):
    preset = load_preset(name)
    source, target = preset.prompts(seed=3)
    judged = preset.judge_prompts(seed=3)
    assert preset.kind == "negation"
    assert target == list(preset.subjects) == list(load_subjects("captions"))
    for side in (source, judged):
        endings = {prompt.removeprefix(caption) for caption, prompt in zip(target, side, strict=True)}
        assert len(endings) == 10
        assert all(animal in ending for ending in endings)
    negating = ("without", "not", "nowhere", "leave out", "anything but", "missing", "never", "free of")
    assert all(any(word in prompt for word in negating) for prompt in judged)
    assert not any(re.search(rf"\b{animal.split()[-1]}\b", prompt) for prompt in target)


@pytest.mark.parametrize(("name", "word"), [("no-people", "people"), ("no-text", "text")])
def test_other_negations_name_what_they_take_away_in_many_words(name, word):
    preset = load_preset(name)
    source, target = preset.prompts(seed=4)
    assert preset.source.tags[0] == word
    assert preset.source.tags == preset.judge.tags
    assert target == list(preset.subjects)
    for side in (source, preset.judge_prompts(seed=4)):
        named = [[tag for tag in preset.source.tags if tag in prompt] for prompt in side]
        assert all(named)
        assert {tag for tags in named for tag in tags} == set(preset.source.tags)


@pytest.mark.parametrize("name", GENERAL)
def test_advice_is_cautious_and_there_for_every_architecture(name):
    preset = load_preset(name)
    assert set(preset.recommended) == set(ARCHITECTURES)
    for advice in preset.recommended.values():
        assert 0.5 <= advice.strength <= 1
        assert advice.support == ("all" if preset.kind == "style" else "observed")


# Subject lists -------------------------------------------------------------------------------------------------------

STYLE = re.compile(
    r"\b(art|artwork|style|styled|aesthetic|paint(ed|ing)|drawing|sketch|illustration|cartoon|render|poster|print|photo\w*"
    r"|picture|film|movie|anime|pixels?|poly|watercolor|oil|ink|neon|futuristic|monochrome|cinematic|realistic|vintage|retro"
    r"|dramatic|lighting|bokeh)\b"
)
WHAT_NEGATIONS_BRING_IN = re.compile(r"\b(elephant|gorilla|bear|text|letters|signs?|logo|watermark)\b")
PEOPLE = re.compile(
    r"\b((wo)?m[ae]n|people|child(ren)?|crowd|tourists?|visitors?|boys?|girls?|famil(y|ies)|friends?)\b"
)


def test_captions_are_many_short_and_without_style():
    captions = load_subjects("captions")
    assert len(captions) >= 240
    assert len({caption.lower() for caption in captions}) == len(captions)
    assert all(5 <= len(caption.split()) <= 14 for caption in captions)
    assert not [caption for caption in captions if STYLE.search(caption) or WHAT_NEGATIONS_BRING_IN.search(caption)]


@pytest.mark.parametrize("name", [*PAPER_STYLES, *MORE_STYLES])
def test_no_caption_has_a_tag_of_a_style(name):
    for tag in load_preset(name).target.tags:
        found = [
            caption for caption in load_subjects("captions") if re.search(rf"\b{re.escape(tag)}\b", caption, re.I)
        ]
        assert not found, tag


def test_places_name_nobody():
    places = load_subjects("places")
    assert len(places) >= 60
    assert not [place for place in places if PEOPLE.search(place)]


def test_presets_without_subjects_use_the_captions(own_folder):
    write(own_folder, VALID.replace('subjects = ["a cat", "a house"]\n', ""))
    assert load_preset("mine").subjects == load_subjects("captions")


# The optional keys ---------------------------------------------------------------------------------------------------

JUDGED = VALID.replace(
    "[recommended.default]",
    """[judge]
templates = ["{subject}, no {tags}"]
tags = ["ink"]

[recommended.default]""",
)


def test_judging_prompts_are_about_the_drawn_subjects(own_folder):
    write(own_folder, JUDGED)
    preset = load_preset("mine")
    subjects = [f"s{i:02}" for i in range(50)]
    source, _ = preset.prompts(subjects, seed=1, count=10)
    assert preset.judge_prompts(subjects, seed=1, count=10) == [f"{subject}, no ink" for subject in source]
    assert preset.judge_prompts() == ["a cat, no ink", "a house, no ink"]


def test_without_judging_prompts_the_source_prompts_are_judged():
    preset = load_preset("demo-no-hat")
    assert preset.judge_prompts(seed=1, count=5) == preset.prompts(seed=1, count=5)[0]


def test_models_are_optional_but_not_empty(own_folder):
    write(own_folder)
    assert load_preset("mine").models == ""
    write(own_folder, VALID.replace("licence =", 'models = "SDXL"\nlicence ='))
    assert load_preset("mine").models == "SDXL"


def test_the_page_about_presets_names_them_and_its_example_is_one(own_folder):
    page = (Path(__file__).parents[1] / "docs" / "presets.md").read_text(encoding="utf-8")
    for name in (*GENERAL, "demo-no-hat", "demo-no-crown", "demo-no-sunglasses"):
        assert f"`{name}`" in page
    for name, what in (("captions", "everyday scenes"), ("places", "places")):
        assert f"`{name}` are {len(load_subjects(name))} {what}" in page
    write(own_folder, re.search("```toml\n(.*?)```", page, re.S)[1])
    preset = load_preset("mine")
    assert preset.subjects == load_subjects("captions")
    assert all("felt pen drawing, bold marker lines, " in prompt for prompt in preset.prompts()[1])


def test_the_module_needs_no_torch():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('presets', {presets.__file__!r})\n"
        "module = sys.modules['presets'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.load_preset('demo-neon-sign').prompts()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Where presets are found ---------------------------------------------------------------------------------------------


def test_own_presets_are_listed_and_hide_built_in_ones(own_folder):
    write(own_folder)
    write(own_folder, VALID.replace('"mine"', '"demo-neon-sign"'), "demo-neon-sign")
    assert "mine" in presets.list_presets()
    assert load_preset("demo-neon-sign").description == "My style."


def test_presets_load_from_a_path(tmp_path):
    path = write(tmp_path)
    assert load_preset(path).name == load_preset(str(path)).name == "mine"
    with pytest.raises(FileNotFoundError, match="no preset file"):
        load_preset(tmp_path / "missing.toml")


def test_subject_lists_lie_beside_the_preset_or_in_the_own_folder(own_folder, tmp_path):
    (own_folder / "pets.txt").write_text("cat # the animal\n\n# none\ndog\n")
    path = write(tmp_path, VALID.replace('["a cat", "a house"]', '"pets"'))
    assert load_preset(path).subjects == ("cat", "dog")
    (tmp_path / "pets.txt").write_text("mouse\n")
    assert load_preset(path).subjects == ("mouse",)


def test_presets_of_the_demo_model_come_last(own_folder):
    write(own_folder, VALID.replace('"mine"', '"zinc"'), "zinc")
    names = presets.list_presets()
    assert names == sorted(set(names) - set(BUILT_IN) | set(GENERAL)) + [n for n in BUILT_IN if n.startswith("demo-")]
    assert names[0] == "anime"


def test_unknown_names_come_with_the_closest(own_folder):
    with pytest.raises(ValueError, match=r"no preset 'demo-neon' \(closest: demo-neon-sign") as caught:
        load_preset("demo-neon")
    assert str(own_folder) in str(caught.value)
    with pytest.raises(ValueError, match=r"no subject list 'emojy' \(closest: emoji"):
        load_subjects("emojy")


# Recommendations -----------------------------------------------------------------------------------------------------


def test_recommendations_fall_back_to_the_default(own_folder):
    write(own_folder)
    preset = load_preset("mine")
    assert preset.recommendation("StableDiffusionXL") == Recommendation(("norm1", "norm2"), 1.0, (0.01, 0.99))
    assert preset.recommendation("Flux") == Recommendation(strength=0.8)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("{subject}, {tags}", "just {tags}", "target.templates has 'just {tags}' without {subject}"),
        ("{subject}, {tags}", "{subject}, {style}", "target.templates .* only {subject} and {tags} are known"),
        ("{subject}, {tags}", "{subject} {, {tags}", "target.templates .* with a single brace"),
        ("{subject}, {tags}", "{subject}", "tags go with {tags}"),
        ('["{subject}"]', '["{subject} {tags}"]', "source.templates .* there are no tags"),
        ('["{subject}"]', '"{subject}"', "source.templates is '{subject}'; it must be a list"),
        ('["{subject}"]', "[]", r"source.templates is \[\]; it must be a list of texts"),
        ('["{subject}"]', "[1]", r"source.templates is \[1\]; it must be a list of texts"),
        ('"ink", "wash"', '"ink", "ink"', "target.tags .* every entry once"),
        ("random_tags = 1", "random_tags = 3", "target.tags has 3 entries, first_tags 1 and random_tags 3"),
        ("random_tags = 1", "random_tags = -1", "target.tags has 3 entries"),
        ("random_tags = 1", "random_tag = 1", "target.random_tag is no key of a preset; did you mean 'random_tags'"),
        ("random_tags = 1", "random_tags = true", "target.random_tags is True; it must be a whole number"),
        ('kind = "style"', 'kind = "stile"', "kind is 'stile'; use one of style, negation, concept"),
        ('kind = "style"', "", "kind is missing; add it"),
        ('licence = "CC0-1.0"', "licence = 1", "licence is 1; it must be a text"),
        ('licence = "CC0-1.0"', 'licence = " "', "licence is empty"),
        ('licence = "CC0-1.0"', 'license = "CC0-1.0"', "licence is missing"),
        ('licence = "CC0-1.0"', 'licence = "CC0-1.0"\ncolour = 3', "colour is no key of a preset; known here: "),
        ('name = "mine"', 'name = "yours"', "name is 'yours', the file is called 'mine'"),
        ("strength = 0.8", 'strength = "high"', "recommended.default.strength is 'high'; it must be a number"),
        ("strength = 0.8", "strenght = 1.0", "recommended.default.strenght .* did you mean 'strength'"),
        ("[0.01, 0.99]", "[0.99, 0.01]", "recommended.StableDiffusionXL.support is"),
        ("[0.01, 0.99]", '"most"', "recommended.StableDiffusionXL.support is 'most'; use"),
        ('["a cat", "a house"]', '"none-such"', "subjects cannot be read: there is no subject list 'none-such'"),
        ("licence =", 'models = " "\nlicence =', "models is empty"),
        ("licence =", 'models = ["SDXL"]\nlicence =', "models is .'SDXL'.; it must be a text"),
        ("[target]", '[judge]\ntemplates = ["{tags}"]\n[target]', "judge.templates has '{tags}' without {subject}"),
        ("[target]", '[judge]\ntext = ["{subject}"]\n[target]', "judge.templates is missing"),
        ("[target]", "[jugde]\n[target]", "jugde is no key of a preset; did you mean 'judge'"),
        ("[source]", "[source", "is not valid TOML: .*line"),
        ("[source]", "[sauce]", "source is missing; add it .a table."),
    ],
)
def test_a_bad_file_is_refused_with_file_key_and_remedy(tmp_path, old, new, problem):
    assert old in VALID
    path = write(tmp_path, VALID.replace(old, new))
    with pytest.raises(ValueError, match=problem) as caught:
        load_preset(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_preset(path)


@pytest.mark.parametrize(
    ("text", "problem"), [("# nothing\n", "lists no subject"), ("cat\ndog\ncat\n", "'cat' more than once")]
)
def test_a_bad_subject_list_is_refused(tmp_path, text, problem):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        load_subjects(path)

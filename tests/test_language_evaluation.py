"""Toxicity, concepts and reports of language models, on tiny models with judges that can be counted by hand."""

import json
import math

import numpy as np
import pytest
import torch

import tiny_language_models
from actmaps.evaluation.language import own_texts
from actmaps.evaluation.language.concepts import concept_presence
from actmaps.evaluation.language.fitting_texts import moments_before, toxic_and_civil
from actmaps.evaluation.language.fluency import continuation_perplexity, perplexity
from actmaps.evaluation.language.generation import continuations
from actmaps.evaluation.language.judges import whole_words
from actmaps.evaluation.language.report import Report, flattened, plot_report
from actmaps.evaluation.language.toxicity import standard_error, toxicity
from actmaps.pipelines import TextGenerationACTPipeline

PROMPTS = ["the sun", "a long walk home", "why"]
PROSE = ["it rained all day", "nobody came"]
SOURCE, TARGET = ["it is cold", "we walk", "go"], ["oh so warm", "run and run", "stay"]


class LengthJudge:
    """Calls texts of more bytes than a limit toxic."""

    name, threshold = "length", 0.5

    def __init__(self, limit):
        self.limit = limit

    def __call__(self, texts):
        return np.array([float(len(text.encode()) > self.limit) for text in texts])

    def word_share(self, texts):
        return float(np.mean([" " in text for text in texts]))


@pytest.fixture
def pipe():
    tokens = tiny_language_models.tokenizer()
    pipe = TextGenerationACTPipeline(model=tiny_language_models.llama(tokens), tokenizer=tokens, device="cpu")
    pipe.fit_act_map(SOURCE, TARGET, name="warm", progress=False)
    return pipe


# Continuations


def test_continuations_are_seeded_and_leave_the_process_alone(pipe):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same = (continuations(pipe, PROMPTS, seed=1, max_new_tokens=5) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert one == same != continuations(pipe, PROMPTS, seed=2, max_new_tokens=5)
    assert not any(text.startswith(prompt) for text, prompt in zip(one, PROMPTS, strict=True))


def test_continuations_are_steered_and_may_be_asked_for_in_words(pipe):
    options = {"do_sample": False, "max_new_tokens": 5}
    plain = continuations(pipe, PROMPTS, act_strength=0.0, **options)
    assert continuations(pipe, PROMPTS, act_strength=2.0, **options) != plain
    asked = continuations(pipe, PROMPTS, act_strength=0.0, instruction="be warm: ", **options)
    assert asked == continuations(pipe, ["be warm: " + p for p in PROMPTS], act_strength=0.0, **options)


# Toxicity


def test_shares_are_those_of_the_judges_over_all_seeds(pipe):
    judges = {"short": LengthJudge(0), "long": LengthJudge(10_000)}
    found = toxicity(pipe, PROMPTS, judges, PROSE, act_strength=0.0, seeds=(0, 1), max_new_tokens=4, min_new_tokens=4)
    assert (found.share, found.share_error, found.mean) == (
        {"short": 1, "long": 0},
        {"short": 0, "long": 0},
        found.share,
    )
    assert found.seeds == {"short": [1, 1], "long": [0, 0]}
    assert found.perplexity == pytest.approx(perplexity(pipe.model, pipe.tokenizer, PROSE), rel=1e-5)
    texts = [t for seed in (0, 1) for t in continuations(pipe, PROMPTS, act_strength=0.0, seed=seed, max_new_tokens=4, min_new_tokens=4)]  # fmt: skip
    expected = continuation_perplexity(pipe.model, pipe.tokenizer, PROMPTS, texts[:3])
    assert found.text_perplexity == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_that_of_the_steered_model(pipe):
    found = toxicity(pipe, PROMPTS, {"length": LengthJudge(3)}, PROSE, act_strength=1.0, max_new_tokens=3)
    with pipe.steered(1.0):
        expected = perplexity(pipe.model, pipe.tokenizer, PROSE)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.perplexity != pytest.approx(perplexity(pipe.model, pipe.tokenizer, PROSE), rel=1e-3)


def test_standard_errors():
    assert standard_error(np.array([0.25]), 12) == pytest.approx(math.sqrt(0.25 * 0.75 / 12))
    assert standard_error(np.array([0.2, 0.4]), 12) == pytest.approx(0.1)


def test_texts_are_parted_by_what_any_judge_says():
    judges = {"a": LengthJudge(5), "b": LengthJudge(3)}
    assert toxic_and_civil(["one", "four", "longer"], judges) == (["four", "longer"], ["one"])
    with pytest.raises(ValueError, match="of 1 texts the judges a, b call 0 toxic"):
        toxic_and_civil(["one"], judges)


def test_moments_end_before_an_offensive_word_or_another():
    texts = ["you are such a damn fool", "damn you and all of that", "we went to the sea today"]
    source, target = moments_before(texts, whole_words(["damn", "fool"]), count=2)
    assert set(source) == {"you are such a", "you are such a damn"}
    for moment in target:
        (text,) = [text for text in texts if text.startswith(moment + " ")]
        following = text.removeprefix(moment + " ").split()[0]
        assert following not in ("damn", "fool")
        assert len(moment.split()) >= 3
    assert moments_before(texts, whole_words(["fool"])) == moments_before(texts, whole_words(["fool"]))
    with pytest.raises(ValueError, match="none of 3 texts has an offensive word behind 3 others"):
        moments_before(texts, whole_words(["heck"]))


# Concepts


def test_presence_is_what_the_judge_says_of_the_texts(pipe):
    options = {"act_strength": 1.0, "max_new_tokens": 4, "min_new_tokens": 4, "seed": 3}
    found = concept_presence(pipe, LengthJudge(0), PROMPTS, PROSE, **options)
    assert (found.probability, found.threshold_share) == (1, 1)
    texts = continuations(pipe, PROMPTS, **options)
    assert found.word_share == pytest.approx(np.mean([" " in text for text in texts]))


def test_the_package_brings_its_concepts_and_statements():
    concepts = own_texts.load_concepts()
    assert {"football", "cloud", "church", "flower", "cat"} <= set(concepts)
    assert "soccer" in concepts["football"].word_forms
    untruthful, truthful = own_texts.own_statements()
    assert len(untruthful) == len(truthful) == 160
    assert [question for question, _ in untruthful] == [question for question, _ in truthful]
    assert all(question.startswith("Q: ") and question.endswith("?\nA:") for question, _ in truthful)
    assert all(answer.startswith(" ") for _, answer in untruthful + truthful)
    assert len(own_texts.own_texts("openers")) == 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sea\n", "mine.toml is no TOML file"),
        ("", "mine.toml has no concept: write a table per concept"),
        ("[sea]\nword_forms = ['sea']", "concept 'sea' needs the lists word_forms and sentences"),
        ("sea = 3", "concept 'sea' needs the lists"),
        ("[sea]\nword_forms = ['sea']\nsentences = [3]", "concept 'sea' needs the lists"),
    ],
)
def test_concepts_that_are_none_are_refused(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        own_texts.load_concepts(file)


def test_concepts_of_ones_own(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[sea]\nword_forms = ['sea']\nsentences = ['The sea is wide.']")
    assert own_texts.load_concepts(file)["sea"].sentences == ("The sea is wide.",)


# Reports


@pytest.fixture
def report():
    rows = [
        {"label": "unsteered", "strength": 0.0, "share.a": 0.5, "cost": 2.0},
        {"label": "strength 1", "strength": 1.0, "share.a": 0.25, "cost": math.nan},
        {"label": "in words", "strength": None, "share.a": 0.3},
    ]
    return Report("Title", {"": "label", "share": "share.a:.1%", "cost": "cost:.2f"}, {"model": "tiny"}, rows)


def test_a_report_as_markdown_and_table(report):
    assert report.markdown().splitlines() == [
        "|  | share | cost |",
        "| --- | ---: | ---: |",
        "| unsteered | 50.0% | 2.00 |",
        "| strength 1 | 25.0% |  |",
        "| in words | 30.0% |  |",
    ]
    assert report.table().row_count == 3


def test_a_report_as_json_says_where_it_comes_from(report, tmp_path):
    report.save(tmp_path / "deep" / "report.json")
    stored = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert stored["rows"][0] == report.rows[0]
    assert {"date", "machine", "model"} <= set(stored["about"])
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        Report("Title", {}, rows=[{"value": object()}]).save(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_a_report_as_a_picture_has_a_line_per_key(report):
    picture = np.array(plot_report(report, "strength", {"share": ["share.a"], "cost": ["cost"]}))
    blue = (np.abs(picture.astype(int) - (0x2F, 0x6F, 0xDE)).sum(-1) < 30).sum()
    assert picture.shape == (420, 1120, 3)
    assert blue > 100


def test_an_axis_that_spans_orders_of_magnitude_is_logarithmic(report):
    def height_of_the_middle(values):
        rows = [{"strength": i, "cost": value} for i, value in enumerate(values)]
        picture = np.array(plot_report(Report("Title", {}, rows=rows), "strength", {"cost": ["cost"]})).astype(int)
        blue = np.abs(picture - (0x2F, 0x6F, 0xDE)).sum(-1) < 30
        columns = np.flatnonzero(blue.any(0))
        middle = np.flatnonzero(blue[:, (columns[0] + columns[-1]) // 2]).mean()
        ends = np.flatnonzero(blue.any(1))
        return (middle - ends[0]) / (ends[-1] - ends[0])

    assert height_of_the_middle([1, 50, 99]) == pytest.approx(0.5, abs=0.03)
    assert height_of_the_middle([1, 100, 10_000]) == pytest.approx(0.5, abs=0.03)


def test_scores_become_one_row(pipe):
    found = flattened(toxicity(pipe, PROMPTS, {"length": LengthJudge(3)}, PROSE, max_new_tokens=2))
    assert {"share.length", "share_error.length", "mean.length", "perplexity", "seeds.length"} <= set(found)

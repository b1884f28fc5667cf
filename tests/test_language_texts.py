"""The texts that language maps are fitted from and judged on: how many, all different, and each what it is meant to be."""

import csv
import importlib.resources
import json
import re
import sys
from collections import Counter

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXTS = importlib.resources.files("actmaps.evaluation") / "language" / "texts"
CONCEPTS = ["football", "cloud", "church", "flower", "cat", "train", "bread"]
STATEMENT = re.compile(r"Q: (?P<question>.+\?) A: (?P<answer>.+\.)")


def read(name: str) -> str:
    return (TEXTS / name).read_text(encoding="utf-8")


def lines(name: str) -> list[str]:
    return read(name).splitlines()


def concepts() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads(read("concepts.toml"))


def statements() -> list[tuple[re.Match[str], re.Match[str]]]:
    rows = list(csv.DictReader(lines("statements.csv")))
    matches = [(STATEMENT.fullmatch(row["truthful"]), STATEMENT.fullmatch(row["untruthful"])) for row in rows]
    return [(truthful, untruthful) for truthful, untruthful in matches if truthful and untruthful]


def questions() -> list[dict]:
    return [json.loads(line) for line in lines("questions.jsonl")]


def naming(*names: str) -> re.Pattern[str]:
    """Any word form of the concepts, as a whole word."""
    forms = [form for name in names for form in concepts()[name]["word_forms"]]
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, forms))})\b", re.IGNORECASE)


def repeated(texts: list[str]) -> list[str]:
    return [text for text, count in Counter(text.lower() for text in texts).items() if count > 1]


def outside(texts: list[str], fewest: int, most: int) -> list[str]:
    return [text for text in texts if not fewest <= len(text.split()) <= most]


# Plain lists ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "fewest", "most"),
    [("neutral.txt", 200, 6, 25), ("openers.txt", 60, 2, 8), ("polite.txt", 120, 6, 25)],
)
def test_a_list_has_its_count_no_line_twice_and_every_line_its_length(name, count, fewest, most):
    assert len(lines(name)) == count
    assert repeated(lines(name)) == []
    assert outside(lines(name), fewest, most) == []


@pytest.mark.parametrize("name", ["neutral.txt", "openers.txt"])
def test_neutral_texts_name_no_concept(name):
    named = naming(*CONCEPTS)
    assert [line for line in lines(name) if named.search(line)] == []


@pytest.mark.parametrize(
    "name", ["concepts.toml", "neutral.txt", "openers.txt", "polite.txt", "questions.jsonl", "statements.csv"]
)
def test_files_are_utf8_with_plain_line_ends(name):
    data = (TEXTS / name).read_bytes()
    assert b"\r" not in data
    assert data.endswith(b"\n")
    assert all(line == line.strip() for line in data.decode("utf-8").splitlines() if not line.startswith(" "))


# Concepts ------------------------------------------------------------------------------------------------------------


def test_the_concepts_are_the_seven():
    assert list(concepts()) == CONCEPTS


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_concept_has_sixty_sentences_of_its_own(name):
    sentences = concepts()[name]["sentences"]
    assert len(sentences) == 60
    assert repeated(sentences) == []
    assert outside(sentences, 6, 25) == []
    others = naming(*(other for other in CONCEPTS if other != name))
    assert [sentence for sentence in sentences if others.search(sentence)] == []


@pytest.mark.parametrize("name", CONCEPTS)
def test_most_sentences_of_a_concept_name_it(name):
    sentences = concepts()[name]["sentences"]
    assert sum(bool(naming(name).search(sentence)) for sentence in sentences) >= 0.85 * len(sentences)


def test_word_forms_are_lower_case_and_belong_to_one_concept():
    forms = [form for concept in concepts().values() for form in concept["word_forms"]]
    assert all(form == form.lower() for form in forms)
    assert repeated(forms) == []
    assert all(name in concept["word_forms"] for name, concept in concepts().items())


def test_no_sentence_stands_in_two_sets():
    sentences = [sentence for concept in concepts().values() for sentence in concept["sentences"]]
    assert repeated([*sentences, *lines("neutral.txt"), *lines("polite.txt")]) == []


# Statements ----------------------------------------------------------------------------------------------------------


def test_there_are_160_statements_of_a_question_and_an_answer():
    assert lines("statements.csv")[0] == "truthful,untruthful"
    assert len(lines("statements.csv")) == 161
    assert len(statements()) == 160


def test_a_pair_shares_its_question_and_differs_in_its_answer():
    for truthful, untruthful in statements():
        assert truthful["question"] == untruthful["question"]
        assert truthful["answer"].lower() != untruthful["answer"].lower()


def test_no_question_of_the_statements_is_asked_twice():
    assert repeated([truthful["question"] for truthful, _ in statements()]) == []


def test_true_answers_are_as_long_as_false_ones():
    true, false = (sum(len(pair[side]["answer"].split()) for pair in statements()) for side in (0, 1))
    assert true == pytest.approx(false, rel=0.05)


# Questions -----------------------------------------------------------------------------------------------------------


def test_there_are_150_questions_of_four_different_choices():
    assert len(questions()) == 150
    assert repeated([question["question"] for question in questions()]) == []
    for question in questions():
        assert set(question) == {"question", "choices", "answer"}
        assert len(question["choices"]) == 4
        assert repeated(question["choices"]) == []
        assert outside(question["choices"], 1, 4) == []


def test_answers_are_spread_evenly_over_the_four_places():
    places = Counter(question["answer"] for question in questions())
    assert set(places) == {0, 1, 2, 3}
    assert all(0.15 <= count / 150 <= 0.35 for count in places.values())

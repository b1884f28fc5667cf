"""Language models with act maps: what is steered, when, and that padding, caches and batches change nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import tiny_language_models
from actmaps.maps import METHODS, ActMap, ActMapMetadata, AffineMap, fit_map, steer
from actmaps.maps.earlier_methods import east
from actmaps.maps.language_sites import language_sites
from actmaps.pipelines import TextGenerationACTPipeline

SOURCE = ["it is cold", "we walk", "a very long road to the sea", "go"]
TARGET = ["it is warm", "we all run and run", "a short way", "stay here", "oh"]
PROMPTS = ["the sun", "a long walk home", "why"]
FAMILIES = ["llama", "gemma"]
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(params=FAMILIES)
def pipe(request):
    return make_pipe(request.param)


@pytest.fixture
def llama():
    return make_pipe("llama")


def make_pipe(family="llama"):
    tokens = tiny_language_models.tokenizer()
    model = getattr(tiny_language_models, family)(tokens)
    return TextGenerationACTPipeline(model=model, tokenizer=tokens, device="cpu")


def fit(pipe, source=SOURCE, target=TARGET, **options):
    return pipe.fit_act_map(source, target, progress=False, **{"name": "warm", "batch_size": 3, **options})


def tokens_of(pipe, prompts=PROMPTS, **options):
    """Generated token ids per prompt, greedy unless said otherwise."""
    options = {"max_new_tokens": 6, "do_sample": False, "batch_size": len(prompts), **options}
    # The random models' end of text would end some rows early.
    outputs = pipe(list(prompts), return_tensors=True, min_new_tokens=options["max_new_tokens"], **options)
    return [[output["generated_token_ids"][-options["max_new_tokens"] :] for output in found] for found in outputs]


def recorded(pipe, site, **call):
    """What a site puts out, forward by forward, while the first prompt is continued."""
    seen = []
    module = pipe.model.get_submodule(site.removeprefix("model."))
    handle = module.register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))
    tokens_of(pipe, PROMPTS[:1], **call)
    handle.remove()
    return seen


def hook_count(pipe):
    modules = list(pipe.model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in modules)


# Fitting


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("actadd", "repe")])
def test_padding_never_becomes_a_sample(pipe, method):
    """Alone no text is padded; in batches, on the left, most are. No two texts begin alike, so that there are no ties."""
    sets = ["cold", "is it", "a very long road"], ["warm", "run and run", "stay", "oh"]
    one, other = (fit(pipe, *sets, name=None, method=method, batch_size=size, positions=None) for size in (1, 5))
    assert list(one) == list(other)
    for site in one:
        scale = one[site].shift.abs().max().clamp_min(1)
        torch.testing.assert_close(one[site].scale, other[site].scale, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one[site].shift / scale, other[site].shift / scale, rtol=1e-3, atol=1e-4)


def test_a_fit_is_that_of_the_core_less_the_token_that_begins_every_text(pipe):
    found = fit(pipe, sites="attention", pooling="mean", batch_size=1)
    batches = [[dict(pipe.tokenizer(text, return_tensors="pt")) for text in texts] for texts in (SOURCE, TARGET)]
    for batch in (batch for batches_of_side in batches for batch in batches_of_side):
        batch["sample_mask"] = torch.arange(batch["input_ids"].shape[1])[None] > 0
    sites = language_sites({"model": pipe.model}, "attention")
    forward = lambda batch: pipe.model(input_ids=batch["input_ids"])  # noqa: E731
    expected = fit_map(pipe.model, *batches, forward=forward, sites=sites, pooling="mean", progress=False)
    assert list(found) == list(expected) == sites
    assert all(torch.equal(found[site].shift, expected[site].shift) for site in sites)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_records_its_modes_and_steers(pipe, method, tmp_path):
    pair = {"actadd": (SOURCE[:1], TARGET[:1]), "repe": (SOURCE, TARGET[:4])}
    fit(pipe, *pair.get(method, (SOURCE, TARGET)), method=method)
    pipe.save_act_map(tmp_path, "warm")
    other = TextGenerationACTPipeline(model=pipe.model, tokenizer=pipe.tokenizer)
    other.load_act_map(tmp_path)
    modes = other._act_maps["warm"].metadata
    convention = METHODS[method]
    assert (modes.method, modes.pooling, modes.causal) == (method, convention.pooling, convention.causal)
    assert tokens_of(other, act_strength=3.0) == tokens_of(pipe, act_strength=3.0) != tokens_of(pipe, act_strength=0.0)


def test_east_weighs_the_target_by_the_entropy_of_what_follows(llama):
    found = fit(llama, method="east", sites=["norm"], batch_size=2)
    last, entropies = [], []
    for text in TARGET:
        inputs = llama.tokenizer(text, return_tensors="pt")
        logits = llama.model(**inputs).logits[0, -1]
        entropies.append(-(logits.softmax(-1) * logits.log_softmax(-1)).sum())
        last.append(llama.model.model(**inputs).last_hidden_state[0, -1])
    expected = east(torch.stack(last), torch.stack(last), torch.stack(entropies))
    torch.testing.assert_close(found["model.model.norm"].shift, expected.shift, rtol=1e-4, atol=1e-4)


def test_chats_are_fitted_as_the_template_writes_them(llama):
    written = llama.tokenizer.apply_chat_template(CHAT, tokenize=False).removeprefix("<bos>")
    one, other = (fit(llama, [text] * 2, ["no"] * 2, name=None) for text in (CHAT, written))
    assert all(torch.equal(one[site].shift, other[site].shift) for site in one)


def test_presets_and_names_of_sites_may_be_mixed(llama):
    found = list(fit(llama, sites=["attention", "layers.0.mlp.down_proj"]))
    assert found == ["model.model.layers.0.self_attn.o_proj", "model.model.layers.0.mlp.down_proj",
                     "model.model.layers.1.self_attn.o_proj"]  # fmt: skip


def test_a_context_is_read_but_not_fitted_on(llama):
    found = fit(llama, [("it is ", "cold")], [("so ", "warm")], method="mean", sites=["norm"])["model.model.norm"]
    means = []
    for context, text in (("it is ", "cold"), ("so ", "warm")):
        hidden = llama.model.model(**llama.tokenizer(context + text, return_tensors="pt")).last_hidden_state[0]
        means.append(hidden[-4:].mean(0))
    torch.testing.assert_close(found.shift, means[1] - means[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", [("context", ""), ("", ""), ""])
def test_nothing_behind_a_context_is_refused(llama, text):
    with pytest.raises(ValueError, match=r"source_texts\[0\] is empty"):
        fit(llama, [text], TARGET)


def test_a_context_that_leaves_no_room_is_refused(llama):
    with pytest.raises(ValueError, match=r"target_texts\[0\] has a context of 8 tokens, and max_length=8 cuts off"):
        fit(llama, SOURCE, [("context", "text")], max_length=8)


def test_sites_are_fitted_where_the_vocabulary_is_reached_too(llama):
    assert list(fit(llama, sites=["lm_head"])) == ["model.lm_head"]


def test_metadata_tells_the_fit(llama):
    data = fit(llama, scope="generated").metadata
    assert (data.name, data.scope, data.n_source, data.n_target) == ("warm", "generated", 4, 5)
    assert data.architecture == {"model": "LlamaForCausalLM"}
    assert len(data.prompts_hash) == 64


# Steering


def test_strength_0_is_the_plain_model_bit_for_bit(pipe):
    def scores():
        inputs = pipe.tokenizer(PROMPTS, return_tensors="pt", padding=True)
        return pipe._forward({**inputs, "prompt_text": PROMPTS}, max_new_tokens=4, output_scores=True,
                             return_dict_in_generate=True)["scores"]  # fmt: skip

    plain = tokens_of(pipe)
    fit(pipe)
    assert tokens_of(pipe, act_strength=0.0) == plain != tokens_of(pipe)
    pipe.disable_act()
    assert tokens_of(pipe) == plain


@pytest.mark.parametrize("scope", ["all", "generated", "last"])
def test_batches_padding_and_caches_change_nothing(pipe, scope):
    fit(pipe, scope=scope)
    alone = [tokens_of(pipe, [prompt])[0] for prompt in PROMPTS]
    assert tokens_of(pipe) == tokens_of(pipe, batch_size=2) == alone
    assert tokens_of(pipe, use_cache=False) == alone
    assert tokens_of(pipe, cache_implementation="static", disable_compile=True) == alone


def test_every_prompt_may_have_its_own_strength(pipe):
    fit(pipe)
    strengths = [0.0, 2.0, 1.0]
    alone = [tokens_of(pipe, [p], act_strength=s)[0] for p, s in zip(PROMPTS, strengths, strict=True)]
    assert tokens_of(pipe, act_strength=strengths) == alone
    assert tokens_of(pipe, act_strength=strengths, batch_size=2) == alone
    assert tokens_of(pipe, act_strength={"warm": strengths}, batch_size=1) == alone


def test_beams_and_several_answers_go_with_their_prompt(pipe):
    fit(pipe)
    options = {"num_beams": 3, "num_return_sequences": 2}
    together = tokens_of(pipe, PROMPTS[:2], act_strength=[0.0, 2.0], **options)
    alone = [tokens_of(pipe, [p], act_strength=s, **options)[0] for p, s in zip(PROMPTS[:2], [0.0, 2.0], strict=True)]
    assert together == alone
    assert [len(answers) for answers in together] == [2, 2]


def test_sampling_is_steered_and_seeded(llama):
    fit(llama)

    def sampled(strength):
        torch.manual_seed(0)
        return tokens_of(llama, do_sample=True, act_strength=strength)

    assert sampled(1.0) == sampled(1.0) != sampled(0.0)


def test_chats_are_steered(llama):
    fit(llama)
    options = {"max_new_tokens": 4, "do_sample": False}
    answers = [llama(CHAT, act_strength=s, **options)[0]["generated_text"][-1] for s in (0.0, 2.0)]
    assert [answer["role"] for answer in answers] == ["assistant"] * 2
    assert answers[0] != answers[1]
    both = llama([CHAT, CHAT], act_strength=[0.0, 2.0], batch_size=2, **options)
    assert [answer[0]["generated_text"][-1] for answer in both] == answers


def test_prompts_may_come_from_a_generator(llama):
    fit(llama)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_tensors": True}
    outputs = llama((prompt for prompt in PROMPTS), act_strength=[0.0, 2.0, 1.0], batch_size=2, **options)
    found = [[answer["generated_token_ids"][-6:] for answer in answers] for answers in outputs]
    assert found == tokens_of(llama, act_strength=[0.0, 2.0, 1.0])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("scope", "moved"),
    [
        ("all", lambda position, prompt: True),
        ("generated", lambda position, prompt: position >= prompt),
        ("last", lambda position, prompt: position == prompt - 1),
    ],
)
def test_a_scope_moves_its_tokens_only(llama, scope, moved, use_cache):
    """One shift behind the embedding: the difference there is the shift or nothing."""
    site, prompt = "model.model.layers.0", len(llama.tokenizer(PROMPTS[0])["input_ids"])
    plain = recorded(llama, site, use_cache=use_cache, max_new_tokens=3)
    llama.load_act_map(ActMap({site: AffineMap(torch.ones(32), torch.eye(32)[0])}, ActMapMetadata(scope=scope)), "a")
    steered = recorded(llama, site, use_cache=use_cache, max_new_tokens=3, act_strength=1e-4)
    seen = 0
    for before, after in zip(plain, steered, strict=True):
        first = seen if use_cache else 0
        for token in range(before.shape[1]):
            shift = (after - before)[0, token, 0].item()
            assert shift == pytest.approx(1e-4 if moved(first + token, prompt) else 0, abs=2e-5), first + token
        seen = first + before.shape[1]


def test_the_scope_may_be_chosen_per_call(llama):
    fit(llama, scope="generated")
    generated = tokens_of(llama)
    assert tokens_of(llama, act_scope="generated") == generated
    assert tokens_of(llama, act_scope="all") != generated


def test_a_function_gives_the_strength_of_each_token(llama):
    fit(llama)
    asked = []

    def late(step, steps):
        asked.append((step, steps))
        return 2.0 if step >= 3 else 0.0

    plain, steered = tokens_of(llama, PROMPTS[:1], act_strength=0.0), tokens_of(llama, PROMPTS[:1], act_strength=late)
    assert list(dict.fromkeys(asked)) == [(step, 6) for step in range(6)]
    assert steered[0][0][:3] == plain[0][0][:3]
    assert steered != plain


def test_several_maps_compose_and_are_named(llama):
    fit(llama)
    fit(llama, TARGET, SOURCE, name="cold")
    assert llama.get_active_act_maps() == ["warm", "cold"]
    assert llama.get_list_act_maps() == {"model": ["warm", "cold"]}
    both = tokens_of(llama)
    llama.set_act_maps("warm", 2.0)
    assert tokens_of(llama) == tokens_of(llama, act_strength={"warm": 2.0}) != both
    llama.delete_act_maps("warm")
    assert llama.get_active_act_maps() == []
    llama.unload_act_maps()
    assert llama.get_list_act_maps() == {}


def test_likelihoods_are_steered_inside_only(pipe):
    act_map = fit(pipe)
    inputs = pipe.tokenizer(PROMPTS[0], return_tensors="pt")
    plain = pipe.model(**inputs).logits
    with pipe.steered(0.5) as model:
        steered = model(**inputs).logits
    with steer(pipe.model, act_map, 0.5):
        expected = pipe.model(**inputs).logits
    assert torch.equal(steered, expected)
    assert torch.equal(pipe.model(**inputs).logits, plain)
    assert not torch.equal(steered, plain)


def test_the_layers_alone_are_steered_as_within_their_model(llama):
    act_map = fit(llama)
    inputs = llama.tokenizer(PROMPTS[0], return_tensors="pt")
    with llama.steered(0.5) as model:
        found = model.base_model(**inputs).last_hidden_state
    with steer(llama.model, act_map, 0.5):
        assert torch.equal(found, llama.model.base_model(**inputs).last_hidden_state)


def test_nothing_is_left_on_the_model(llama):
    before = hook_count(llama)
    fit(llama)
    tokens_of(llama)
    with pytest.raises(RuntimeError, match="out of words"):
        tokens_of(llama, act_strength=lambda *_: (_ for _ in ()).throw(RuntimeError("out of words")))
    assert hook_count(llama) == before


def test_a_model_is_loaded_from_its_folder(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    loaded = TextGenerationACTPipeline.from_pretrained(str(tmp_path), device="cpu")
    loaded.load_act_map(fit(llama), "warm")
    assert loaded.tokenizer.padding_side == "left"
    assert tokens_of(loaded) == tokens_of(llama)


def test_a_tokenizer_without_padding_pads_with_the_end_of_text():
    tokens = tiny_language_models.tokenizer()
    tokens.pad_token = None
    pipe = TextGenerationACTPipeline(model=tiny_language_models.llama(tokens), tokenizer=tokens)
    fit(pipe)
    assert [len(answers[0]) for answers in tokens_of(pipe)] == [6, 6, 6]


# Mistakes


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ([], TARGET, "the source set is empty"),
        (SOURCE, [], "the target set is empty"),
        (["good", 3], TARGET, r"source_texts\[1\] is neither a text, a context with a text, nor a chat, but 3"),
        (SOURCE, "warm", "target_texts is one string"),
    ],
)
def test_sets_that_are_none_are_refused(llama, source, target, message):
    with pytest.raises(ValueError, match=message):
        fit(llama, source, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "first"}, "scope must be one of all, generated, last"),
        ({"method": "linea"}, "method must be one of linear, mean"),
        ({"sites": ["attn"]}, "site 'attn' is not in the model"),
        ({"pooling": "middle"}, "pooling must be one of"),
        ({"method": "repe"}, "'repe' needs pairs, got 4 source and 5 target"),
    ],
)
def test_unknown_options_are_refused(llama, options, message):
    with pytest.raises(ValueError, match=message):
        fit(llama, **options)
    assert hook_count(llama) == 0


def test_names_are_taken_once(llama):
    fit(llama)
    with pytest.raises(ValueError, match="an act map named 'warm' is already loaded"):
        fit(llama)


def test_strengths_that_do_not_fit_are_refused_before_anything_is_generated(llama):
    fit(llama)
    with pytest.raises(ValueError, match="act_strength has 2 numbers for 3 prompts"):
        tokens_of(llama, act_strength=[1.0, 2.0])
    with pytest.raises(ValueError, match="no act map named 'cold' is loaded"):
        tokens_of(llama, act_strength={"cold": 1.0})
    with pytest.raises(TypeError, match="must be a number"):
        tokens_of(llama, act_strength="strong")


def test_likelihoods_have_no_generated_tokens(llama):
    fit(llama, scope="generated")
    with pytest.raises(ValueError, match="act map 'warm' moves 'generated' tokens"), llama.steered():
        pass


def test_a_map_of_another_model_is_refused(llama):
    other = make_pipe("gemma")
    act_map = fit(other, sites="post_norms")
    with pytest.raises(ValueError, match=r"that this model .*LlamaForCausalLM.* lacks"):
        llama.load_act_map(act_map)
    assert Counter(llama.get_list_act_maps()) == {}

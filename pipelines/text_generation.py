"""Language models with act maps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextGenerationPipeline

from ..maps import ActMap, ActMapMetadata, Method, fit_map
from ..maps.earlier_methods import east
from ..maps.language_sites import LANGUAGE_SITES, language_sites
from ..maps.methods import as_method
from ..maps.ranks import Ranks
from .loader import ActMapLoaderMixin, model_name
from .steered_generation import SteeredGeneration, check_scope
from .strength import Strength

# A text; a text behind a context (context, text); or a chat as transformers writes it: [{"role": ..., "content": ...}, ...].
Text: TypeAlias = "str | tuple[str, str] | Sequence[Mapping[str, Any]]"


class TextGenerationACTPipeline(ActMapLoaderMixin, TextGenerationPipeline):
    """`TextGenerationPipeline` steered by act maps on its language model.

    Maps are armed while text is generated and taken off afterwards, so models that are shared are never steered elsewhere. For
    other uses of the model, such as likelihoods, there is `steered`.

    Example:
        >>> pipe = TextGenerationACTPipeline.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> pipe.fit_act_map(angry_texts, calm_texts, name="calm")
        >>> pipe("I told him that", act_strength=0.8, max_new_tokens=30)
    """

    tokenizer: Any  # never None here

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Prompts of a batch end together, so that what follows is generated; see `SteeredGeneration`.
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *, device: str | torch.device | None = None, **model_options: Any
    ) -> TextGenerationACTPipeline:
        """Load a causal language model and its tokenizer from a folder or the hub.

        Args:
            pretrained_model_name_or_path: see `AutoModelForCausalLM.from_pretrained`.
            device: where the model runs; default a GPU if there is one.
            **model_options: such as `dtype`, `revision` or `device_map`; see `AutoModelForCausalLM.from_pretrained`.
        """
        of_both = {key: model_options[key] for key in ("revision", "cache_dir", "token") if key in model_options}
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **of_both)
        model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, **model_options)
        return cls(model=model, tokenizer=tokenizer, device=device)

    @property
    def _act_modules(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def _act_narrowed_to(self, act_map: ActMap) -> list[str]:
        scope = act_map.metadata.scope
        return [] if scope == "all" else [f"{scope!r} tokens"]

    def fit_act_map(
        self,
        source_texts: Iterable[Text],
        target_texts: Iterable[Text],
        *,
        name: str | None = None,
        sites: str | Sequence[str] | None = "norms",
        method: str | Method = "linear",
        scope: str = "all",
        batch_size: int = 16,
        max_length: int = 256,
        seed: int = 0,
        progress: bool = True,
        **fit_options: Any,
    ) -> ActMap:
        """Fit a map from two sets of texts, and load it under `name`.

        Args:
            source_texts, target_texts: what the model says now, and what it should say: texts; tuples (context, text), of which
                the context is read but not fitted on, such as a question before its answer; or chats, which the tokenizer's
                chat template writes out. Unpaired; the numbers may differ.
            name: name of the map, under which it is loaded and active; with None it is only returned.
            sites: a preset ("norms", "post_norms", "attention", "mlp", "blocks"), suffixes of module names, a list of these, or a
                full-match regular expression.
            method: a key of `METHODS`: "linear", "mean", "gaussian", or an earlier method such as "caa" or "iti_c"; each brings its
                pooling and support, unless `fit_options` say otherwise.
            scope: which tokens the map moves: "all", "generated" only, or the "last" of the prompt.
            batch_size: texts per micro-batch.
            max_length: longer texts are cut to so many tokens.
            seed: of the draw of positions.
            progress: show a progress bar.
            **fit_options: `pooling`, `positions`, `support`, `causal`, `transport_target`, see `fit_map`.

        Returns:
            The `ActMap`.

        Raises:
            ValueError: for empty sets, unknown options, or sites that the model lacks.
        """
        check_scope(scope)
        texts = {
            side: _as_list(of_side, side) for side, of_side in (("source", source_texts), ("target", target_texts))
        }
        self._check_new(name)
        names = self._expanded(sites)
        batches = {side: self._micro_batches(of_side, side, batch_size, max_length) for side, of_side in texts.items()}
        method = as_method(method)
        if method.estimator is east and fit_options.get("pooling", method.pooling) != "none":
            method = replace(method, estimator=partial(east, weights=self._entropies(batches["target"])))
        act_map = fit_map(
            self._act_modules,
            batches["source"],
            batches["target"],
            sites=names,
            forward=self._forward_for(names),
            method=method,
            seed=seed,
            progress=progress,
            metadata=ActMapMetadata(
                name=name or "act_map",
                scope=scope,
                rows="both",
                model_name=model_name(self.model.config.name_or_path or "", type(self.model).__name__),
                n_source=len(texts["source"]),
                n_target=len(texts["target"]),
                prompts_hash=hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
            ),
            **fit_options,
        )
        if name is not None:
            self.load_act_map(act_map, name)
        return act_map

    def _expanded(self, sites: str | Sequence[str] | None) -> str | list[str] | None:
        """`sites` with presets replaced by the sites that they stand for."""
        if sites is None or (isinstance(sites, str) and sites not in LANGUAGE_SITES):
            return sites
        patterns = [sites] if isinstance(sites, str) else sites
        parts = (language_sites(self._act_modules, p) if p in LANGUAGE_SITES else [p] for p in patterns)
        return [site for part in parts for site in part]

    def _micro_batches(
        self, texts: Sequence[Text], side: str, batch_size: int, max_length: int
    ) -> list[dict[str, Tensor]]:
        """The texts as token ids and masks (B, T), in their order.

        The token that begins every text is no sample: it says the same in all of them, and in many models its activations are
        hundreds of times larger than others.
        """
        encoded = [self._encoded(text, f"{side}_texts[{index}]", max_length) for index, text in enumerate(texts)]
        batches = []
        for start in range(0, len(encoded), batch_size):
            some = encoded[start : start + batch_size]
            padded = self.tokenizer.pad([{"input_ids": ids} for ids, _ in some], return_tensors="pt")
            batch = dict(padded.to(self.device))
            mask = batch["attention_mask"].bool()
            first = torch.tensor([context for _, context in some], device=mask.device)[:, None]
            sampled = mask & (batch["input_ids"] != self.tokenizer.bos_token_id) & (mask.cumsum(1) > first)
            batches.append({**batch, "sample_mask": sampled})
        return batches

    def _encoded(self, text: Text, name: str, max_length: int) -> tuple[list[int], int]:
        """At most `max_length` token ids of a text, and how many of them are context."""
        if isinstance(text, str):
            ids, context = self.tokenizer(text)["input_ids"], 0
        elif isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text):
            # Tokenised together, since the end of the context may share a token with what follows.
            before, ids = (self.tokenizer(part)["input_ids"] for part in (text[0], "".join(map(str, text))))
            same = (one == other for one, other in zip(before, ids, strict=False))
            context = next((i for i, equal in enumerate(same) if not equal), min(len(before), len(ids)))
        elif isinstance(text, Sequence) and text and all(isinstance(message, Mapping) for message in text):
            ids, context = self.tokenizer.apply_chat_template(list(text), return_dict=True)["input_ids"], 0
        else:
            raise ValueError(f"{name} is neither a text, a context with a text, nor a chat, but {text!r}")
        if all(token == self.tokenizer.bos_token_id for token in ids[context:]):
            raise ValueError(f"{name} is empty")
        if context >= max_length:
            raise ValueError(
                f"{name} has a context of {context} tokens, and max_length={max_length} cuts off what follows"
            )
        return ids[:max_length], context

    def _forward_for(self, sites: str | Sequence[str] | None) -> Any:
        """Runs the layers that hold the sites; the projection to the vocabulary, which costs most in small models, if asked."""
        head = isinstance(sites, list) and any("lm_head" in site for site in sites)
        network = self.model if head or isinstance(sites, str) else self.model.base_model
        return lambda batch: network(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    @torch.no_grad()
    def _entropies(self, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """Entropy in nats of what follows each text (texts,). The ranks of a process group share the batches."""
        ranks, found = Ranks.current(), [torch.empty(0, device=self.device)]
        with ranks.reporting():
            for batch in ranks.share(batches):
                inputs, mask = batch["input_ids"], batch["attention_mask"]
                logits = self.model(inputs, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]
                found.append(torch.distributions.Categorical(logits=logits.float()).entropy())
        return ranks.gather(torch.cat(found))

    @contextmanager
    def steered(self, act_strength: float | Mapping[str, Strength] | None = None) -> Iterator[nn.Module]:
        """Keep the active maps armed on `self.model` inside, on all tokens, for likelihoods, evaluation harnesses and the like.

        Args:
            act_strength: as for `__call__`; not a function and not by prompt.

        Raises:
            ValueError: if an active map moves certain tokens only, which are not defined outside of generation.
        """
        maps = self._act_maps_for(act_strength)
        for act_map in maps:
            if act_map.metadata.scope != "all":
                raise ValueError(
                    f"act map {act_map.metadata.name!r} moves {act_map.metadata.scope!r} tokens, which are defined while "
                    "the pipeline generates; call the pipeline, or fit the map with scope='all'"
                )
        with SteeredGeneration(self._act_modules, maps, {}):
            yield self.model

    def __call__(  # type: ignore[override]
        self, text_inputs: Any, *, act_strength: Any = None, act_scope: str | None = None, **kwargs: Any
    ) -> Any:
        """Generate with the active maps.

        Args:
            text_inputs, **kwargs: as for `TextGenerationPipeline`: a text, a chat, or a list of them; `batch_size`, and what
                `generate` takes.
            act_strength: for this call only. None takes the strengths as set; a number, one number per prompt or a function
                (step, steps) -> number of the token that is generated holds for every active map; a dict {map name: strength}
                changes some.
            act_scope: for this call only: "all", "generated" or "last"; None takes each map's own.

        Returns:
            What the pipeline without maps returns. With strength 0 it is bit for bit the same.
        """
        if act_scope is not None:
            check_scope(act_scope)
        maps = self._act_maps_for(act_strength)
        if isinstance(text_inputs, list) and all(isinstance(text, str) for text in text_inputs):
            for strength in maps.values():
                _check_count(strength, len(text_inputs))
        return super().__call__(text_inputs, act_call=_ActCall(maps, act_scope), **kwargs)

    def _sanitize_parameters(  # type: ignore[override]
        self, act_call: _ActCall | None = None, **kwargs: Any
    ) -> Any:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        return preprocess, forward if act_call is None else {**forward, "act_call": act_call}, postprocess

    def _forward(  # type: ignore[override]
        self, model_inputs: Any, act_call: _ActCall | None = None, **generate_kwargs: Any
    ) -> Any:
        if act_call is None or not act_call.maps:
            return super()._forward(model_inputs, **generate_kwargs)
        rows, length = model_inputs["input_ids"].shape
        maps = act_call.of_next_prompts(rows)
        scopes = {act_map: act_call.scope or act_map.metadata.scope for act_map in maps}
        steps = self._new_tokens(generate_kwargs, length)
        with SteeredGeneration(self._act_modules, maps, scopes, prompt_length=length, steps=steps):
            return super()._forward(model_inputs, **generate_kwargs)

    def _new_tokens(self, generate_kwargs: Mapping[str, Any], prompt_length: int) -> int:
        """How many tokens at most a call generates: what is said nearest to the call holds."""
        nearest = GenerationConfig(**{key: generate_kwargs.get(key) for key in ("max_new_tokens", "max_length")})
        pipeline_configs = (getattr(self, name, None) for name in ("generation_config", "_default_generation_config"))
        for config in (
            nearest,
            generate_kwargs.get("generation_config"),
            self.model.generation_config,
            *pipeline_configs,
        ):
            if config is not None and config.max_new_tokens:
                return config.max_new_tokens
            if config is not None and config.max_length:
                return max(1, config.max_length - prompt_length)
        return 20  # what `generate` takes if nothing is said


def _as_list(texts: Iterable[Text], side: str) -> list[Text]:
    if isinstance(texts, str):
        raise ValueError(f"{side}_texts is one string; give a list of texts")
    texts = list(texts)
    if not texts:
        raise ValueError(f"the {side} set is empty; give at least one text")
    return texts


@dataclass
class _ActCall:
    """The maps of one call, whose prompts come batch by batch."""

    maps: dict[ActMap, Strength]
    scope: str | None
    next_prompt: int = 0

    def of_next_prompts(self, count: int) -> dict[ActMap, Strength]:
        """The maps with the strengths of the next `count` prompts."""
        first = self.next_prompt
        self.next_prompt += count
        return {act_map: _of_prompts(strength, first, count) for act_map, strength in self.maps.items()}


def _of_prompts(strength: Any, first: int, count: int) -> Any:
    """`strength` with lists of one number per prompt cut to `count` prompts from number `first`."""
    if isinstance(strength, Mapping):
        return {key: _of_prompts(value, first, count) for key, value in strength.items()}
    if not isinstance(strength, Sequence):
        return strength
    part = strength[first : first + count]
    if len(part) < count:
        raise ValueError(f"act_strength has {len(strength)} numbers, too few: give one number per prompt")
    return part


def _check_count(strength: Any, prompts: int) -> None:
    """Raise ValueError unless lists have one number per prompt."""
    for part in strength.values() if isinstance(strength, Mapping) else [strength]:
        if isinstance(part, Sequence) and len(part) != prompts:
            raise ValueError(f"act_strength has {len(part)} numbers for {prompts} prompts: give one number per prompt")

"""One run of a language model with its active maps armed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..maps import ActMap
from ..maps.hooks import before_call
from .steered_call import ArmedPart, armed_parts
from .strength import Strength

# Which positions a map moves, given those of a forward and the length of the prompt, padding on its left included.
SCOPES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "all": lambda positions, _prompt: torch.ones_like(positions, dtype=torch.bool),
    "generated": lambda positions, prompt: positions >= prompt,
    "last": lambda positions, prompt: positions == prompt - 1,
}


def check_scope(scope: str) -> None:
    """Raise ValueError unless `scope` is a key of `SCOPES`."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")


class SteeredGeneration:
    """Maps armed on a language model, which keeps strengths and moved tokens right from forward to forward.

    Prefill and decoding steps, with a key-value cache or without, are told apart by the positions that each forward computes.

    Args:
        modules: {component name: module}, of which the one component is the language model.
        maps: {map: strength}, applied in this order.
        scopes: {map: key of `SCOPES`}; left out ones move all tokens.
        prompt_length: tokens of the prompts, padding on the left included.
        steps: how many tokens at most are generated, for strengths that are a function of the step.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        maps: Mapping[ActMap, Strength],
        scopes: Mapping[ActMap, str],
        prompt_length: int = 0,
        steps: int = 1,
    ) -> None:
        (self._model,) = modules.values()
        self._prompt_length, self._steps, self._step = prompt_length, steps, 0
        self._armed: list[tuple[ArmedPart, str]] = []
        try:
            for act_map, strength in maps.items():
                for armed in armed_parts(modules, act_map, strength):
                    self._armed.append((armed, scopes.get(act_map, "all")))
                    armed.set(0, steps)  # for callers that run the layers without the model around them
        except BaseException:
            self.remove()
            raise
        self._undo = before_call(self._model, self._before_forward)

    def _before_forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        # On the CPU, whatever the model's device: what follows asks for their values.
        positions = _first_position(kwargs) + torch.arange(tokens.shape[1])
        for armed, scope in self._armed:
            armed.set(min(self._step, self._steps - 1), self._steps)
            if scope == "all":
                continue
            moved = SCOPES[scope](positions, self._prompt_length)
            armed.steering.tokens = None if moved.all() else moved[None]
            if not moved.any():
                armed.steering.strength = 0.0
        self._step += 1

    def remove(self) -> None:
        """Restore the model."""
        if hasattr(self, "_undo"):
            self._undo()
        for armed, _ in self._armed:
            armed.steering.remove()

    def __enter__(self) -> SteeredGeneration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _first_position(kwargs: Mapping[str, Any]) -> int:
    """Position of the first token that a forward computes: how many the key-value cache holds."""
    # The argument is called past_key_values or cache, by version and model.
    cache = next((value for value in kwargs.values() if hasattr(value, "get_seq_length")), None)
    return 0 if cache is None else int(cache.get_seq_length())

"""Continuations of prompts by a steered language model, seeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...pipelines import TextGenerationACTPipeline


def continuations(
    pipe: TextGenerationACTPipeline,
    prompts: Sequence[str],
    *,
    act_strength: float | Mapping[str, Any] | None = None,
    instruction: str = "",
    max_new_tokens: int = 20,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
    **generate_options: Any,
) -> list[str]:
    """What the model writes after each prompt; the prompt itself is left out.

    Args:
        pipe: a pipeline with its maps loaded and active.
        prompts: n texts.
        act_strength: see `TextGenerationACTPipeline.__call__`.
        instruction: put before every prompt: how one would ask for the same in words.
        max_new_tokens: length of a continuation.
        seed: of the sampling; the random state of the process is left as it was.
        batch_size: prompts that are continued at once.
        progress: show a progress bar.
        **generate_options: for `generate`; by default the model's full distribution is sampled (no top-k, no top-p).

    Returns:
        n continuations.
    """
    import torch
    from tqdm import tqdm

    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, **generate_options}
    found: list[str] = []
    devices = [pipe.device] if pipe.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        tqdm(total=len(prompts), disable=not progress, unit="prompt", leave=False) as bar,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = [instruction + prompt for prompt in prompts[start : start + batch_size]]
            outputs = pipe(
                batch,
                batch_size=batch_size,
                act_strength=act_strength,
                max_new_tokens=max_new_tokens,
                return_full_text=False,
                **options,
            )
            found += [output[0]["generated_text"] for output in outputs]
            bar.update(len(batch))
    return found

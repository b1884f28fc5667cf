"""What test_distributed.py fits, in its own process or in several: python rank_cases.py RANK COUNT FOLDER [TROUBLE].

Every rank writes a map per case, and what comes of each trouble, into the folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import tiny_language_models
import tiny_models
from actmaps.cli_options import readable_errors
from actmaps.cli_ranks import joined_ranks
from actmaps.maps import METHODS, Ranks, fit_map
from actmaps.pipelines import TextGenerationACTPipeline


def normal(*shape, mean=0.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean


def prompts(count, *shape, mean=0.0):
    """Micro-batches of one to three rows."""
    return [normal(1 + index % 3, *shape, mean=mean, seed=index) for index in range(count)]


# Fits that come out the same for every number of ranks --------------------------------------------------------------


def chain(source=5, target=4, units=6, **options):
    """Three linear layers, on tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(units, units) for _ in range(3)))
    sides = prompts(source, 4, units), prompts(target, 4, units, mean=0.5)
    return fit_map(model, *sides, sites=["0", "1", "2"], progress=False, **options)


def unet():
    """All norms of a U-Net, whose registration order is not its execution order, of unequal sides."""
    torch.manual_seed(1)

    def side(count, mean):
        return [
            {
                "sample": normal(2, 4, 8, 8, seed=index),
                "timestep": torch.tensor([100 * index, 900]),
                "encoder_hidden_states": normal(2, 5, 32, mean=mean, seed=index + 10),
            }
            for index in range(count)
        ]

    return fit_map(tiny_models.unet(), side(5, 0.0), side(3, 0.7), positions=9, transport_target=True, progress=False)


def llama(**options):
    """A pipeline whose texts are of unequal length, five micro-batches of each side."""
    tokens = tiny_language_models.tokenizer()
    pipe = TextGenerationACTPipeline(model=tiny_language_models.llama(tokens), tokenizer=tokens)
    source = [f"it rains on day {number**3}" for number in range(9)]
    target = [f"{number**5} suns shine" for number in range(10)]
    return pipe.fit_act_map(source, target, batch_size=2, progress=False, **options)


CASES = {
    **{f"chain, {name}": lambda name=name: chain(method=name, target=5) for name in METHODS if name != "actadd"},
    "chain, observed support": lambda: chain(support="observed"),
    "chain, quantiles as support": lambda: chain(support=(0.1, 0.9), method="gaussian"),
    "chain, fitted at once": lambda: chain(causal=False, positions=2),
    "chain, cut by batch_size": lambda: chain(source=3, batch_size=1),
    "chain, fewer micro-batches than ranks": lambda: chain(source=1, target=1, method="actadd"),
    "chain, fewer units than ranks": lambda: chain(units=1),
    "unet": unet,
    "llama": lambda: llama(offload=True),
    "llama, east": lambda: llama(method="east"),
    "llama, iti_c": lambda: llama(method="iti_c"),
}


# What ends a fit, on every rank -------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """x -> factor * x."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


class Forks(nn.Module):
    """Two ways through the model, by the sign of the input."""

    def __init__(self):
        super().__init__()
        self.left, self.right = Scaled(1.0), Scaled(1.0)

    def forward(self, x):
        return self.left(x) if x.mean() > 0 else self.right(x)


def scaled_fit(source, target, forward=None, model=None, **options):
    model = model or nn.Sequential(Scaled(2.0), Scaled(3.0))
    sites = [name for name, module in model.named_modules() if isinstance(module, Scaled)]
    return fit_map(
        model,
        source,
        target,
        sites=sites,
        forward=forward and forward(model),
        progress=False,
        method="mean",
        **options,
    )


def raising(error):
    """A forward that raises behind the first site on what begins with 99."""

    def forward(model):
        def run(x):
            bad, x = x.flatten()[0] == 99, model[0](x)
            if bad:
                raise error
            return model[1](x)

        return run

    return forward


def numbered(*firsts):
    """Micro-batches of one prompt and two units, of which the first is given."""
    return [torch.tensor([[float(first), 1.0]]) for first in firsts]


def one_each():
    """A micro-batch per rank; that of the last rank takes another way through `Forks`."""
    return numbered(*[5] * (Ranks.current().count - 1), -5)


def killed(x):
    os.kill(os.getpid(), signal.SIGKILL)


def by_rank():
    """On rank 0 nothing, on rank 1 a row of ones, on rank 2 two rows of twos."""
    rank = Ranks.current().rank
    return torch.full((rank, 2), rank, dtype=torch.float16) if rank else torch.empty(0)


def failing_before_gather():
    ranks = Ranks.current()
    with ranks.reporting():
        if ranks.rank == ranks.count - 1:
            raise OSError("no such latents")
    return ranks.gather(torch.zeros(1))


LAST = numbered(0, 1, 2, 3, 4, 99)  # its end lies on the last rank, for two or three
TROUBLES = {
    "a forward raises": lambda: scaled_fit(LAST, LAST[:-1], raising(KeyError("colour"))),
    "a forward is interrupted": lambda: scaled_fit(LAST, LAST[:-1], raising(KeyboardInterrupt())),
    "the first unit is not finite": lambda: scaled_fit(numbered(1, 2, 3), numbered(1, torch.nan, 3)),
    "paths fork": lambda: scaled_fit(numbered(5, 5, 5), numbered(-5, -5, -5), model=Forks()),
    "paths fork between ranks": lambda: scaled_fit(one_each(), one_each(), model=Forks()),
    "units differ": lambda: scaled_fit(prompts(2, 1), prompts(2, 2)),
    "other options": lambda: scaled_fit(numbered(1, 2), numbered(3, 4), seed=Ranks.current().rank),
    "other micro-batches": lambda: scaled_fit(numbered(*range(2 + Ranks.current().rank)), numbered(3)),
    "gathered": lambda: Ranks.current().gather(by_rank()).tolist(),
    "gathered nothing": lambda: list(Ranks.current().gather(torch.empty(0, 7)).shape),
    "gathered other shapes": lambda: Ranks.current().gather(torch.zeros(1, Ranks.current().rank + 1)),
    "one fails before the others gather": failing_before_gather,
    "alone": lambda: scaled_fit(numbered(Ranks.current().rank), numbered(3), ranks=Ranks())["model.0"].shift.tolist(),
}


def outcome(trouble):
    """What a trouble returns, or the error that it raises, as text."""
    try:
        found = trouble()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return found if isinstance(found, list) else repr(found)


def main(rank, count, folder, trouble=None):
    torch.set_num_threads(1)
    if trouble == "a command fails":
        with readable_errors(debug=False), joined_ranks("cpu"):
            TROUBLES["a forward raises"]()
    init = f"file://{folder}/meeting-point"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    if trouble == "a rank is killed":
        forward = (lambda model: killed) if rank == count - 1 else None
        outcomes = {trouble: outcome(lambda: scaled_fit(numbered(1, 2, 3), numbered(4, 5, 6), forward))}
    else:
        # Troubles come first: whatever they are, the group goes on.
        outcomes = {name: outcome(trouble) for name, trouble in TROUBLES.items()}
        for name, case in CASES.items():
            case().save(folder / f"{name}, rank {rank}.safetensors")
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])

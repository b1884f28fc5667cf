"""What a steered model costs: its time against the same model without a map, side by side.

    python benchmarks/overhead.py                                        # all models, all variants; compiling takes minutes
    python benchmarks/overhead.py --model sdxl --variant plain hooks     # one model, nothing compiled
    python benchmarks/overhead.py --device cuda --dtype bfloat16 --real-size --json overhead.json

Models: one step of SDXL's U-Net on an unconditional and a conditional row, one step of FLUX's transformer, and a language model that
decodes with a key-value cache. Their weights are random and their blocks those of the real ones; see random_models.py.

Variants: "plain again" is the noise, what the ratio of a model to itself comes to; "hooks" steers with `steer`, "rows" steers the
conditional row only; "folded" has the map in its weights; "compiled" is torch.compile without a map, and "compiled hooks" with one.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import StaticCache

from actmaps.maps import ActMap, fold, steer
from measuring import Setup, Timings, add_options, finished, side_by_side, started
from random_models import MODELS, Subject, build

TARGET_RATIO = 1.02
# By name, what it is compared with.
VARIANTS = {
    "plain": "plain",
    "plain again": "plain",
    "hooks": "plain",
    "rows": "plain",
    "folded": "plain",
    "compiled": "plain",
    "compiled hooks": "compiled",
}
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Run:
    """How one model is run.

    Attributes:
        forward: runs a module of the model's kind and returns what it puts out.
        steps: denoising steps or tokens of one run.
        rows: row strengths that steer the conditional rows only; None where there are no others.
    """

    forward: Callable[[nn.Module], Tensor]
    steps: int
    rows: Tensor | None


def denoising(subject: Subject, rows: int) -> Run:
    """One step on `rows` rows; of two or more, the first half are unconditional."""
    inputs = subject.inputs(rows)
    conditional = (torch.arange(rows) >= rows // 2).float() if rows > 1 else None
    return Run(lambda module: module(**inputs, return_dict=False)[0], 1, conditional)


def decoding(subject: Subject, rows: int, tokens: int) -> Run:
    """The most likely next token, `tokens` times, after a prompt that is read once."""
    prompt = subject.inputs(rows)["input_ids"][:, :PROMPT_TOKENS]
    caches: dict[nn.Module, StaticCache] = {}

    def forward(module: nn.Module) -> Tensor:
        # Of a compiled model only the steps are: prompts have other lengths every time.
        reader = getattr(module, "_orig_mod", module)
        named = "cache" if "cache" in inspect.signature(reader.forward).parameters else "past_key_values"
        if module not in caches:
            caches[module] = StaticCache(config=reader.config, max_cache_len=PROMPT_TOKENS + tokens)
        cache = caches[module]
        cache.reset()
        logits = reader(input_ids=prompt, **{named: cache}).logits
        for _ in range(tokens):
            token = logits[:, -1:].argmax(-1)
            logits = module(input_ids=token, **{named: cache}).logits
        return logits

    return Run(forward, tokens, None)


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same weights."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


class Variants:
    """One model in its variants, each as a setup for `side_by_side`. What was compiled is kept from one round to the next."""

    def __init__(self, subject: Subject, run: Run, backend: str) -> None:
        self.model, self.run, self.backend = subject.module, run, backend
        self.act_map: ActMap = subject.random_map()
        self._kept = ExitStack()
        self._compiled: dict[str, nn.Module] = {}

    def setups(self, names: list[str]) -> dict[str, Setup]:
        made: dict[str, Setup] = {
            "plain": self._plain,
            "plain again": self._plain,
            "hooks": self._hooks,
            "rows": lambda: self._hooks(self.run.rows),
            "folded": self._folded,
            "compiled": lambda: self._compiled_as("compiled"),
            "compiled hooks": lambda: self._compiled_as("compiled hooks"),
        }
        return {name: made[name] for name in names if name != "rows" or self.run.rows is not None}

    @contextmanager
    def _plain(self) -> Iterator[Callable[[], Tensor]]:
        yield lambda: self.run.forward(self.model)

    @contextmanager
    def _hooks(self, rows: Tensor | None = None) -> Iterator[Callable[[], Tensor]]:
        with steer(self.model, self.act_map, rows=rows):
            yield lambda: self.run.forward(self.model)

    @contextmanager
    def _folded(self) -> Iterator[Callable[[], Tensor]]:
        with fold(self.model, self.act_map, 1.0):
            yield lambda: self.run.forward(self.model)

    @contextmanager
    def _compiled_as(self, name: str) -> Iterator[Callable[[], Tensor]]:
        if name not in self._compiled:
            module = shared_copy(self.model)
            if name == "compiled hooks":
                self._kept.enter_context(steer(module, self.act_map))
            self._compiled[name] = torch.compile(module, backend=self.backend)
        module = self._compiled[name]
        yield lambda: self.run.forward(module)

    def close(self) -> None:
        self._kept.close()


@dataclass
class Row:
    """One variant of one model, medians."""

    model: str
    variant: str
    compared_with: str
    milliseconds: float
    per_second: float
    ratio: float
    spread: tuple[float, float]
    cpu_ratio: float
    deviation: float | None
    """Largest difference to the output with hooks, as a share of what those change."""


@torch.no_grad()
def measure(subject: Subject, run: Run, names: list[str], backend: str, rounds: int) -> tuple[list[Row], list[str]]:
    """The rows of a model, and remarks on what cannot be measured on it."""
    device = next(subject.module.parameters()).device
    variants = Variants(subject, run, backend)
    setups, outputs, remarks = variants.setups(names), {}, []
    try:
        for name, setup in list(setups.items()):
            try:
                with setup() as forward:
                    outputs[name] = forward().float()
            except ValueError as error:
                if name != "folded":
                    raise
                remarks.append(f"{subject.title} cannot be folded: {textwrap.shorten(str(error), 200)}")
                del setups[name]
        timings = side_by_side(setups, rounds, device)
    finally:
        variants.close()
    return [_row(subject, run, name, timings, outputs) for name in setups], remarks


def _row(subject: Subject, run: Run, name: str, timings: Timings, outputs: dict[str, Tensor]) -> Row:
    reference = VARIANTS[name] if VARIANTS[name] in outputs else "plain"
    deviation = None
    if name in ("folded", "compiled hooks") and "hooks" in outputs:
        change = (outputs["hooks"] - outputs["plain"]).abs().max()
        deviation = float((outputs[name] - outputs["hooks"]).abs().max() / change)
    return Row(
        model=subject.title,
        variant=name,
        compared_with=reference,
        milliseconds=1000 * timings.seconds(name) / run.steps,
        per_second=run.steps / timings.seconds(name),
        ratio=timings.ratio(name, reference),
        spread=timings.spread(name, reference),
        cpu_ratio=timings.cpu_ratio(name, reference),
        deviation=deviation,
    )


def table(rows: list[Row], backend: str, size: str) -> Table:
    made = Table(
        title=f"A step, models of {size} size, torch.compile backend {backend}",
        caption=f"ratio: median over rounds, with quartiles, of the time to that of the variant in brackets; target {TARGET_RATIO}\n"
        "deviation: from the output with hooks, as a share of what the map changes",
    )
    for column in ("model", "variant", "ms", "per second", "ratio", "quartiles", "CPU ratio", "deviation"):
        made.add_column(column, justify="left" if column in ("model", "variant") else "right")
    model = ""
    for row in rows:
        if model and row.model != model:
            made.add_section()
        style = "green" if row.ratio <= TARGET_RATIO else "red"
        made.add_row(
            "" if row.model == model else row.model,
            row.variant,
            f"{row.milliseconds:.1f}",
            f"{row.per_second:.1f}",
            "" if row.variant == "plain" else f"[{style}]{row.ratio:.3f}[/] ({row.compared_with})",
            "" if row.variant == "plain" else f"{row.spread[0]:.3f} to {row.spread[1]:.3f}",
            "" if row.variant == "plain" else f"{row.cpu_ratio:.3f}",
            "" if row.deviation is None else f"{row.deviation:.0e}",
        )
        model = row.model
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["sdxl", "flux", "llama"])
    parser.add_argument("--variant", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--real-size", action="store_true", help="real widths and depths, for a GPU")
    parser.add_argument("--size", type=int, help="of latents; default: of the model")
    parser.add_argument("--rows", type=int, default=2, help="of the batch; half of them are unconditional")
    parser.add_argument("--tokens", type=int, default=16, help="that the language model decodes in a run")
    parser.add_argument("--rounds", type=int, default=11)
    default = "inductor" if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") else "aot_eager"
    parser.add_argument(
        "--backend",
        default=default,
        help="of torch.compile; default: inductor with a C++ compiler, else aot_eager; here %(default)s",
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    console, device, dtype = started(options)
    names = list(dict.fromkeys(["plain", *options.variant]))
    rows: list[Row] = []
    remarks: list[str] = []
    for model in options.model:
        with console.status(f"measuring {model}"):
            subject = build(model, device, dtype, real=options.real_size, size=options.size)
            run = (
                decoding(subject, options.rows, options.tokens)
                if model == "llama"
                else denoising(subject, options.rows)
            )
            measured, said = measure(subject, run, names, options.backend, options.rounds)
        rows += measured
        remarks += said
    console.print(table(rows, options.backend, "real" if options.real_size else "reduced"))
    for remark in remarks:
        console.print(remark)
    finished(console, options, device, {"backend": options.backend, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()

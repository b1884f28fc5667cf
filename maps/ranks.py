"""The processes that fit one map together: who takes what, and how they swap it.

Each exchange starts with a meeting, where all ranks swap a few numbers. A rank that has failed says so at the next meeting, which is where the
others wait for it; so all end with its message, and none hangs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_NUMBERS = 9  # swapped in a meeting
_MESSAGE_BYTES = 1000
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8)


class RankError(RuntimeError):
    """Another rank has failed, or is gone."""


@dataclass(frozen=True)
class Ranks:
    """The processes of torch.distributed's default group, seen from one of them; `Ranks()` is a process on its own.

    Every method but `share` and `sizes` is called by all ranks, in the same order.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """The ranks of the process group, if one is initialised, else this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def sizes(self, total: int, first: int = 0) -> list[int]:
        """How many of `total` things each rank takes: equally many, and what is left over one by one from rank `first` on."""
        each, left = divmod(total, self.count)
        return [each + ((rank - first) % self.count < left) for rank in range(self.count)]

    def share(self, items: Sequence[T], first: int = 0) -> Sequence[T]:
        """The items that this rank takes. All shares, rank by rank, are the items in their order; see `sizes`."""
        sizes = self.sizes(len(items), first)
        start = sum(sizes[: self.rank])
        return items[start : start + sizes[self.rank]]

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell the others of an error inside. A meeting must follow, where they learn of it."""
        try:
            yield
        except BaseException as error:
            if self.count > 1:
                with suppress(RankError):
                    message = ": ".join(filter(None, (type(error).__name__, str(error))))
                    self._swap_failures(self._swap_numbers((), failed=True), message)
            raise

    def meet(self, *numbers: int) -> list[list[int]]:
        """The numbers of every rank, at most nine each, when all have come.

        Raises:
            RankError: if another rank has failed meanwhile, with its message.
        """
        if self.count == 1:
            return [list(numbers)]
        heard = self._swap_numbers(numbers, failed=False)
        if any(failed for failed, *_ in heard):
            raise RankError("; ".join(self._swap_failures(heard, "")))
        return [said[: len(numbers)] for _, *said in heard]

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors (n, ...) of all ranks behind one another, rank by rank. The numbers n may differ.

        A rank that has nothing gives an empty tensor on its device; only that counts of it.

        Raises:
            ValueError: if shapes differ in more than n, or dtypes differ.
            RankError: if another rank fails.
        """
        if self.count == 1:
            return tensor
        said = (len(tensor), _DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape[1:])
        heard = self.meet(*said, *[0] * (_NUMBERS - len(said)))
        kinds = {(dtype, tuple(shape[: ndim - 1])) for rows, dtype, ndim, *shape in heard if rows}
        if len(kinds) > 1:
            named = " and ".join(sorted(f"(n, *{list(shape)}) of {_DTYPES[dtype]}" for dtype, shape in kinds))
            raise ValueError(f"the ranks have tensors that do not go together: {named}")
        if not kinds:
            return tensor
        ((dtype, shape),) = kinds
        part = tensor if len(tensor) else tensor.new_empty(0, *shape, dtype=_DTYPES[dtype])
        return self.concatenate(part, [rows for rows, *_ in heard])

    def concatenate(self, part: Tensor, rows: Sequence[int]) -> Tensor:
        """As `gather`, without a meeting, where all know how many `rows` each rank has, and the shape of one."""
        if self.count == 1:
            return part
        padded = part.new_zeros(max(rows), *part.shape[1:], device=_carrier(part.device))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in rows]
        with self._exchange():
            dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)]).to(part.device)

    def swap_units(self, samples: Tensor, rows: Sequence[int]) -> Tensor:
        """The samples of all ranks, rank by rank, but only of the units that this rank takes: from (n, C) to (sum of n, C').

        Args:
            samples: (n, C) in float32, the same C on all ranks.
            rows: n of every rank.
        """
        if self.count == 1:
            return samples
        widths = self.sizes(samples.shape[1])
        mine = widths[self.rank]
        packed = torch.cat([part.flatten() for part in samples.split(widths, dim=1)]).to(_carrier(samples.device))
        received = packed.new_empty(sum(rows) * mine)
        with self._exchange():
            dist.all_to_all_single(
                received, packed, [n * mine for n in rows], [len(samples) * width for width in widths]
            )
        return received.view(sum(rows), mine).to(samples.device)

    def _swap_numbers(self, numbers: Sequence[int], *, failed: bool) -> list[list[int]]:
        """Whether each rank has failed, and its numbers."""
        said = [int(failed), *numbers, *[0] * (_NUMBERS - len(numbers))]
        return self._swap(torch.tensor(said)).tolist()

    def _swap_failures(self, heard: list[list[int]], message: str) -> list[str]:
        """What the failed ranks have to say; `message` is this one's."""
        said = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES)
        texts = self._swap(torch.tensor(list(said), dtype=torch.uint8)).tolist()
        return [
            f"rank {rank} of {self.count} failed: {bytes(text).decode(errors='ignore').strip()}"
            for rank, (text, (failed, *_)) in enumerate(zip(texts, heard, strict=True))
            if failed
        ]

    def _swap(self, said: Tensor) -> Tensor:
        return self.concatenate(said[None], [1] * self.count)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.count} has lost the others: one has died, or does something else ({error})"
            ) from error


def _carrier(device: torch.device) -> torch.device:
    """Where tensors of `device` go to be swapped: stay, if a backend of the group serves that device, else host memory."""
    backends = dict(entry.split(":") for entry in dist.get_backend_config().split(","))
    if backends.get(device.type, "gloo") != "gloo":
        return device
    return torch.device("cpu" if "cpu" in backends else next(iter(backends)))

"""Host memory for the activations of forwards that wait."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Smaller tensors stay where they are: they are many, they hold little, and fitted maps are among them.
MIN_BYTES = 2**20


class Offload(TorchDispatchMode):
    """Keeps track of the tensors that one forward makes, and moves those still alive to host memory and back.

    Enter it around every stretch of the forward; `park` when the forward is suspended, `restore` before it goes on. Tensors
    keep their identity: only their storage is emptied and filled again, so whoever holds them in a frame notices nothing.

    Args:
        keep: tensors whose storages must never move, such as parameters and buffers.
        min_bytes: size from which a storage moves.
    """

    def __init__(self, keep: Iterable[Tensor], min_bytes: int = MIN_BYTES) -> None:
        super().__init__()
        self._kept = {tensor.untyped_storage()._cdata for tensor in keep}
        self._min_bytes = min_bytes
        self._made: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._parked: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # A view of something that came from outside (an input, a weight) is not this forward's to move.
        foreign = {leaf.untyped_storage()._cdata for leaf in given if self._made.get(id(leaf)) is not leaf}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in foreign:
                self._made[id(leaf)] = leaf
        return output

    def park(self) -> int:
        """Move all large live storages to host memory; returns how many bytes they hold."""
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self._made.values()}
        for address, storage in storages.items():
            if address not in self._kept and storage.nbytes() >= self._min_bytes:
                self._parked.append((storage, torch.UntypedStorage(storage.nbytes(), device="cpu").copy_(storage)))
                storage.resize_(0)
        return sum(copy.nbytes() for _, copy in self._parked)

    def restore(self) -> None:
        """Bring everything back."""
        for storage, copy in self._parked:
            storage.resize_(copy.nbytes())
            storage.copy_(copy)
        self._parked.clear()

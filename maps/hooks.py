"""One hook per module that runs any number of output transforms in the order in which they were attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

Transform = Callable[[nn.Module, Any], Any]


class _Chain:
    """The transforms on one module, behind a single forward hook."""

    def __init__(self, module: nn.Module) -> None:
        self.transforms: list[Transform] = []
        # Prepended, because transformers captures hidden states with hooks of its own, which must see our output.
        self._handle = module.register_forward_hook(self._run, prepend=True)

    def _run(self, module: nn.Module, _args: Any, output: Any) -> Any:
        for transform in tuple(self.transforms):
            output = transform(module, output)
        return output

    def remove(self) -> None:
        self._handle.remove()


_CHAINS: WeakKeyDictionary[nn.Module, _Chain] = WeakKeyDictionary()


def attach(module: nn.Module, transform: Transform) -> Callable[[], None]:
    """Run `transform(module, output) -> output` after `module`, behind the transforms attached before it.

    Returns:
        A function that detaches the transform; calling it again does nothing.
    """
    chain = _CHAINS.get(module)
    if chain is None:
        chain = _CHAINS[module] = _Chain(module)
    chain.transforms.append(transform)

    def detach() -> None:
        if transform in chain.transforms:
            chain.transforms.remove(transform)
            if not chain.transforms and _CHAINS.get(module) is chain:
                chain.remove()
                del _CHAINS[module]

    return detach

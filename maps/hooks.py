"""One hook per module that runs any number of output transforms in the order in which they were attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Transform = Callable[[nn.Module, Any], Any]


class _Chain:
    """The transforms on one module, behind a single forward hook that holds the only reference to them.

    Nothing outside the module refers to its chain, so that a steered model that goes out of use is collected. A deep copy of
    the module gets an empty chain: who steers the original holds no handle on the copy.
    """

    def __init__(self) -> None:
        self.transforms: list[Transform] = []

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> Any:
        for transform in tuple(self.transforms):
            output = transform(module, output)
        return output

    def __reduce__(self) -> tuple[type[_Chain], tuple[()]]:
        return _Chain, ()


def attach(module: nn.Module, transform: Transform) -> Callable[[], None]:
    """Run `transform(module, output) -> output` after `module`, behind the transforms attached before it.

    Returns:
        A function that detaches the transform; calling it again does nothing.
    """
    hooks = module._forward_hooks
    chain = next((hook for hook in hooks.values() if isinstance(hook, _Chain)), None)
    if chain is None:
        chain = _Chain()
        # Prepended, because transformers captures hidden states with hooks of its own, which must see our output.
        module.register_forward_hook(chain, prepend=True)
    chain.transforms.append(transform)

    def detach() -> None:
        if transform not in chain.transforms:
            return
        chain.transforms.remove(transform)
        if not chain.transforms:
            for key in [key for key, hook in hooks.items() if hook is chain]:
                del hooks[key]

    return detach

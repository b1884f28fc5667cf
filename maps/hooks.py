"""What runs around modules: any number of output transforms, and callbacks before a call.

Both work in eager and in compiled models, whether `torch.compile` came before or after. Forward hooks do not: code that is
compiled before one comes goes on without it, and code that is compiled with one keeps it for good. So transforms stand in a
`forward` of the instance, which compiled code guards: it is compiled once without and once with them, however often they come and go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Transform = Callable[[Any], Any]
Callback = Callable[[tuple[Any, ...], Mapping[str, Any]], None]


class _Chain:
    """The transforms on one module. Its `forward` is the module's as long as there are any.

    Nothing outside the module refers to its chain, so that a steered model that goes out of use is collected. A deep copy of
    the module gets an empty chain: who steers the original holds no handle on the copy.

    Args:
        plain: the `forward` of the module before.
        own: that it was an attribute of the instance, such as accelerate's, which comes back at the end.
    """

    def __init__(self, plain: Callable[..., Any], own: bool) -> None:
        self.plain, self.own = plain, own
        self.transforms: list[Transform] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.plain(*args, **kwargs)
        for transform in tuple(self.transforms):
            output = transform(output)
        return output

    def __reduce__(self) -> tuple[type[_Chain], tuple[Callable[..., Any], bool]]:
        return _Chain, (self.plain, self.own)


def _chain_of(module: nn.Module) -> _Chain | None:
    """The chain whose `forward` is the module's. One that somebody else wrapped since goes on working in there."""
    chain = getattr(module.__dict__.get("forward"), "__self__", None)
    return chain if isinstance(chain, _Chain) else None


def attach(module: nn.Module, transform: Transform) -> Callable[[], None]:
    """Run `transform(output) -> output` after `module`, behind the transforms attached before it and ahead of all forward hooks.

    In a compiled module that makes a graph of its own for each arrangement of transforms. What they read is guarded as anything
    else: change tensors, not numbers, to change what they do.

    Returns:
        A function that detaches the transform; calling it again does nothing.
    """
    module = getattr(module, "_orig_mod", module)  # compiled parents look through the wrapper of a compiled child
    chain = _chain_of(module)
    if chain is None:
        chain = _Chain(module.forward, "forward" in module.__dict__)
        module.__dict__["forward"] = chain.forward
    chain.transforms.append(transform)

    def detach() -> None:
        if transform not in chain.transforms:
            return
        chain.transforms.remove(transform)
        if chain.transforms or _chain_of(module) is not chain:
            return
        if chain.own:
            module.__dict__["forward"] = chain.plain
        else:
            del module.__dict__["forward"]

    return detach


class _CompiledCall:
    """Callbacks in front of what `module.compile()` compiled."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self.compiled = compiled
        self.callbacks: list[Callback] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for callback in tuple(self.callbacks):
            callback(args, kwargs)
        return self.compiled(*args, **kwargs)


def before_call(module: nn.Module, callback: Callback) -> Callable[[], None]:
    """Run `callback(args, kwargs)` in front of every call of `module`, as Python, also where `module.compile()` compiled it.

    Returns:
        A function that takes the callback off; calling it again does nothing.
    """
    compiled = module.__dict__.get("_compiled_call_impl")
    if compiled is None:
        # What `torch.compile(module)` returns runs its own hooks outside of what is compiled.
        hook = module.register_forward_pre_hook(lambda _, args, kwargs: callback(args, kwargs), with_kwargs=True)
        return hook.remove
    call = compiled if isinstance(compiled, _CompiledCall) else _CompiledCall(compiled)
    module.__dict__["_compiled_call_impl"] = call
    call.callbacks.append(callback)

    def remove() -> None:
        if callback in call.callbacks:
            call.callbacks.remove(callback)
        if not call.callbacks and module.__dict__.get("_compiled_call_impl") is call:
            module.__dict__["_compiled_call_impl"] = call.compiled

    return remove

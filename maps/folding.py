"""Folding maps into the weights of a model, where they cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .act_map import ActMap
from .affine import AffineMap
from .arming import ArmedMap
from .foldable import Layer, NotFoldableError, layer_of, owner_of, with_bias
from .places import Place, Steerable, roots
from .steering import Steering, steer

_LISTED = 20  # sites in an error, for each reason
# The folds of each module that are in force, in their order.
_folds: WeakKeyDictionary[nn.Module, list[object]] = WeakKeyDictionary()


def fold(
    model: Steerable, act_map: ActMap | Mapping[ActMap, float], strength: float = 1.0, *, partial: bool = False
) -> Folded:
    """Fold a map, or several one after the other, into the weights of `model`, until `unfold()` or the end of the `with` block.

    The model then computes what `steer` makes it compute, for all rows, tokens and steps, without a hook. Norms, adaptive norms
    of diffusers, linear and convolutional layers fold; supports, the spatial rule "shift", outputs of blocks, norms without
    weights, and weights that are quantised, offloaded, shared, or wrapped by LoRA do not.

    Existing parameters are changed in place, so optimizers and compiled models keep them; their originals are kept, which
    takes the memory of the folded weights once more. A bias is added where a shift needs one. RMS norms whose class knows no
    bias get a subclass that adds it. A folded map acts before all hooks.

    Args:
        model: a module, {component name: module}, or {site name: `Place`}.
        act_map: a map, or {map: strength}, as for `steer`.
        strength: 0 leaves the model bit for bit as it is, 1 is the full transport. It multiplies the strengths of several maps.
        partial: leave the sites that do not fold to hooks, instead of raising.

    Returns:
        A `Folded`, which is a context manager and a handle.

    Raises:
        ValueError: naming the sites that do not fold and why, or if the model lacks sites of a map or has other unit counts;
            the model is then as it was.

    Example:
        >>> with fold(unet, act_map, strength=0.8):
        ...     unet(**inputs)
        >>> folded = fold(unet, act_map)
        >>> folded.unfold()
    """
    strengths = {act_map: 1.0} if isinstance(act_map, ActMap) else dict(act_map)
    if not strengths:
        raise ValueError("no act map to fold")
    strengths = {folded: strength * own for folded, own in strengths.items()}
    plan = plan_fold(model, strengths)
    if plan.refused and not partial:
        raise ValueError(
            refusal(plan.refused, "fold", "set partial=True to leave them to hooks, or select the others")
        )
    return Folded(model, plan, strengths)


class Folded:
    """Maps folded into a model. Leaving the `with` block or `unfold()` restores it bit for bit; both may be repeated.

    Attributes:
        hooked: the sites that did not fold and are left to hooks.
    """

    def __init__(self, model: Steerable, plan: Plan, strengths: Mapping[ActMap, float]) -> None:
        self.hooked = tuple(plan.refused)
        self._restore: list[Callable[[], None]] = []
        self._steering: Steering | None = None
        self._owners = [layer.owner for layer in plan.layers]
        self._token = object()
        for owner in self._owners:
            _folds.setdefault(owner, []).append(self._token)
        try:
            if plan.refused:
                self._steering = steer(model, _only(strengths, plan.refused))
            for layer in plan.layers:
                for name, values in layer.parameters().items():
                    self._restore.append(_replace(layer, name, values))
        except BaseException:
            self.unfold()
            raise

    def unfold(self) -> None:
        """Restore the model bit for bit.

        Raises:
            RuntimeError: if another map has been folded into the same layers since, and is still there.
        """
        if any(_folds[owner][-1] is not self._token for owner in self._owners):
            raise RuntimeError("another map was folded into the same layers later; unfold that one first")
        if self._steering is not None:
            self._steering.remove()
        while self._restore:
            self._restore.pop()()
        while self._owners:
            _folds[self._owners.pop()].pop()

    def __enter__(self) -> Folded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unfold()


@dataclass(frozen=True)
class FoldedLayer:
    """The weights of one layer, and the maps that go into them.

    Attributes:
        owner: the module that holds the weights.
        name: its name, which is that of a site: `"<component>.<module path>"`.
        moves: (layer, map) in the order in which they apply, the maps at their strength and for all units of the layer.
    """

    owner: nn.Module
    name: str
    moves: tuple[tuple[Layer, AffineMap], ...]

    @torch.no_grad()
    def parameters(self) -> dict[str, Tensor]:
        """New values, in float32 or better, of the parameters that change; "bias" also where there is none yet."""
        old_weight, old_bias = self.owner._parameters["weight"], getattr(self.owner, "bias", None)
        assert old_weight is not None
        device, precision = old_weight.device, torch.promote_types(old_weight.dtype, torch.float32)
        weight, bias = old_weight.to(precision), None if old_bias is None else old_bias.to(precision)
        for layer, affine in self.moves:
            weight, bias = layer.folded(
                weight, bias, affine.scale.to(device, precision), affine.shift.to(device, precision)
            )
        assert bias is not None
        changed = {} if torch.equal(weight, old_weight.to(precision)) else {"weight": weight}
        same_bias = not bias.any() if old_bias is None else torch.equal(bias, old_bias.to(precision))
        return changed if same_bias else {**changed, "bias": bias}


@dataclass(frozen=True)
class Plan:
    """What folding would do to a model.

    Attributes:
        layers: the layers whose weights change.
        refused: {site that does not fold: why}.
    """

    layers: tuple[FoldedLayer, ...]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class _Move:
    """A map at its strength, on a site."""

    site: str
    place: Place
    module: nn.Module
    affine: AffineMap
    spatial: str


def plan_fold(model: Steerable, strengths: Mapping[ActMap, float]) -> Plan:
    """How {map: strength} fold into `model`, which stays as it is. Sites that a map leaves as they are need nothing.

    Raises:
        ValueError: if a strength is not finite, the model lacks sites of a map, or has other unit counts.
    """
    moves: dict[nn.Module, list[_Move]] = {}  # by owner of the weights
    for act_map, strength in strengths.items():
        if not isfinite(strength):
            raise ValueError(f"the strength of act map {act_map.metadata.name!r} must be finite, got {strength}")
        for site in ArmedMap(act_map, model).sites:
            affine, module = (
                act_map[site.name].at(strength),
                getattr(site.place.module, "_orig_mod", site.place.module),
            )
            if affine.unit_mask.any():
                move = _Move(site.name, site.place, module, affine, act_map.metadata.spatial)
                moves.setdefault(owner_of(module), []).append(move)
    holders = _holders(model)
    layers, refused = [], {}
    for owner, of_owner in moves.items():
        try:
            layers.append(_planned(owner, of_owner, holders))
        except NotFoldableError as error:
            refused.update({move.site: str(error) for move in of_owner})
    return Plan(tuple(layers), refused)


def refusal(refused: Mapping[str, str], what: str, remedy: str) -> str:
    """An error that names every site and why it is refused."""
    by_reason: dict[str, list[str]] = {}
    for site, reason in refused.items():
        by_reason.setdefault(reason, []).append(site)
    lines = []
    for reason, sites in by_reason.items():
        more = f" and {len(sites) - _LISTED} more" if len(sites) > _LISTED else ""
        lines.append(f"\n  {', '.join(sites[:_LISTED])}{more}: {reason}")
    return f"{len(refused)} sites do not {what}:{''.join(lines)}\n{remedy}"


def _planned(owner: nn.Module, moves: Sequence[_Move], holders: Mapping[int, Mapping[nn.Module, str]]) -> FoldedLayer:
    """The layer with all its moves, shown to be foldable.

    Raises:
        NotFoldableError: if one of the moves does not fold: then none does, since they apply in order.
    """
    layers = {move.module: layer_of(move.module) for move in moves}
    # An adaptive norm comes after the linear layer inside, whatever their order in the map.
    ordered = sorted(moves, key=lambda move: move.module is not owner)
    folded = FoldedLayer(
        owner, _name(ordered[0], owner), tuple((layers[m.module], _of_layer(m, layers[m.module])) for m in ordered)
    )
    weight = owner._parameters["weight"]
    assert weight is not None
    for name, values in folded.parameters().items():
        parameter = owner._parameters.get(name)
        dtype = weight.dtype if parameter is None else parameter.dtype
        if not values.to(dtype).isfinite().all():
            raise NotFoldableError(f"its folded {name} would not be finite in {dtype}")
        others = [] if parameter is None else [n for m, n in holders[parameter.data_ptr()].items() if m is not owner]
        if others:
            raise NotFoldableError(f"its {name} is shared with {', '.join(others)}")
    return folded


def _name(move: _Move, owner: nn.Module) -> str:
    return move.site if move.module is owner else f"{move.site}.linear"


def _of_layer(move: _Move, layer: Layer) -> AffineMap:
    """The map of a move, for all units of its layer."""
    affine, place = move.affine, move.place
    if affine.lower is not None:
        raise NotFoldableError("its map has a support, so what it does depends on the activation")
    if place.tokens is not None or place.entry != 0:
        raise NotFoldableError("it is only a part of what its layer puts out")
    if place.channels_first != (layer.channel_dim == 1):
        raise NotFoldableError("its units lie in another dim than those of its layer")
    if move.spatial == "shift" and layer.channel_dim == 1 and (affine.scale != 1).any():
        raise NotFoldableError("spatial='shift' scales the mean over all positions, not the position")
    units = place.units or slice(None)
    scale, shift = torch.ones(layer.units), torch.zeros(layer.units)
    if len(scale[units]) != affine.channels:
        raise NotFoldableError(f"its layer has {len(scale[units])} units, its map {affine.channels}")
    scale[units], shift[units] = affine.scale.cpu(), affine.shift.cpu()
    return AffineMap(scale, shift)


def _holders(model: Steerable) -> dict[int, dict[nn.Module, str]]:
    """The modules that hold each parameter, with their names, by where the parameter lies in memory."""
    holders: dict[int, dict[nn.Module, str]] = {}
    for root in roots(model):
        for name, module in root.named_modules():
            for parameter in module._parameters.values():
                if type(parameter) is nn.Parameter:
                    of_parameter = holders.setdefault(parameter.data_ptr(), {})
                    of_parameter.setdefault(module, name.replace("_orig_mod.", ""))
    return holders


def _only(strengths: Mapping[ActMap, float], sites: Mapping[str, str]) -> dict[ActMap, float]:
    """The maps cut down to `sites`."""
    parts = {}
    for act_map, strength in strengths.items():
        kept = {site: affine for site, affine in act_map.items() if site in sites}
        if kept:
            parts[ActMap(kept, act_map.metadata)] = strength
    return parts


def _replace(layer: FoldedLayer, name: str, values: Tensor) -> Callable[[], None]:
    """Give a parameter other values, or add a bias; returns what takes it back."""
    owner = layer.owner
    parameter = owner._parameters.get(name)
    if parameter is None:
        return _add_bias(owner, values, layer.moves[0][0].reads_bias)
    with _writing(parameter):
        original = parameter.detach().clone()
        parameter.data.copy_(values)

    def restore() -> None:
        # Looked up again: a model that was moved meanwhile may have other parameters.
        now = owner._parameters[name]
        assert now is not None
        with _writing(now):
            now.data.copy_(original)

    return restore


def _add_bias(owner: Any, values: Tensor, reads_bias: bool) -> Callable[[], None]:
    kind: Any = type(owner)
    weight = owner._parameters["weight"]
    attribute, registered = "bias" in owner.__dict__, "bias" in owner._parameters
    if not reads_bias:
        owner.__class__ = with_bias(kind)
    with torch.inference_mode(False):
        owner.bias = nn.Parameter(values.to(weight.dtype, copy=True), requires_grad=weight.requires_grad)

    def restore() -> None:
        owner.__class__ = kind
        del owner.bias
        if attribute:
            owner.bias = None
        elif registered:
            owner.register_parameter("bias", None)

    return restore


@contextmanager
def _writing(parameter: Tensor) -> Iterator[None]:
    """Where `parameter` may be changed in place; one that was made in inference mode only there."""
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        yield

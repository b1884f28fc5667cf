"""A map for a whole model: one `AffineMap` per site, and how it was fitted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch

from .affine import AffineMap
from .sites import match_sites


@dataclass(frozen=True)
class ActMapMetadata:
    """Where a map comes from and which modes it was fitted in. Everything here is stored in the file.

    Attributes:
        name, description, licence, created: for people; `created` is an ISO 8601 UTC time.
        method, pooling, positions, support, spatial, causal, transport_target, seed: the arguments of `fit_map`.
        timesteps: fractions of the sampling run that were recorded (0 = pure noise); empty for text models.
        window: part of the sampling run, as fractions of its steps, in which the map acts on the denoiser.
        latents: whose sampling runs they are: "own", "source" or "target".
        scope: which tokens a language model's map moves: "all", "generated" or "last" (of the prompt).
        rows: "cond" steers the conditional rows of classifier-free guidance only, "both" all rows.
        architecture: class name per component, for example {"unet": "UNet2DConditionModel"}.
        model_name: name or path of the model that the map was fitted on.
        n_source, n_target: numbers of prompts; prompts_hash identifies the two sets.
        recommended_strength: where to start.
        presets: names of the prompt presets used.
        costs: per site the mean squared 2-Wasserstein distance over units (Gaussian closed form) between source and
            target activations before and after the map.
        libraries: versions that fitted the map.
    """

    name: str = "act_map"
    description: str = ""
    method: str = "linear"
    pooling: str = "none"
    positions: int | None = None
    support: str | tuple[float, float] = "all"
    spatial: str = "affine"
    causal: bool = True
    transport_target: bool = False
    seed: int = 0
    timesteps: tuple[float, ...] = ()
    window: tuple[float, float] = (0.0, 1.0)
    latents: str = "own"
    rows: str = "cond"
    scope: str = "all"
    architecture: Mapping[str, str] = field(default_factory=dict)
    model_name: str = ""
    n_source: int = 0
    n_target: int = 0
    prompts_hash: str = ""
    recommended_strength: float = 1.0
    presets: tuple[str, ...] = ()
    costs: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""
    created: str = ""


class ActMap(Mapping[str, AffineMap]):
    """Immutable mapping from site name to `AffineMap`, in execution order, with metadata.

    Compared and hashed by identity, so that it can key the weights of `ActMap.blend` and the strengths of `steer`.

    Raises:
        ValueError: if there is no site.
    """

    def __init__(self, maps: Mapping[str, AffineMap], metadata: ActMapMetadata | None = None) -> None:
        if not maps:
            raise ValueError("an act map needs at least one site")
        self._maps = dict(maps)
        self.metadata = metadata or ActMapMetadata()

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __getitem__(self, site: str) -> AffineMap:
        return self._maps[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def __repr__(self) -> str:
        units = sum(m.channels for m in self.values())
        return f"ActMap({self.metadata.name!r}, {len(self)} sites, {units} units, method={self.metadata.method!r})"

    @property
    def components(self) -> tuple[str, ...]:
        """Components that the sites belong to, in order of execution, for example ("text_encoder", "unet")."""
        return tuple(dict.fromkeys(site.split(".", 1)[0] for site in self))

    def save(self, path: str | PathLike[str]) -> None:
        """Write one `.safetensors` file; see `actmaps.maps.files.save`."""
        from .files import save

        save(self, path)

    @classmethod
    def load(
        cls, path_or_hub_id: str | PathLike[str], *, filename: str | None = None, revision: str | None = None
    ) -> ActMap:
        """Read a map from a file, a folder or a hub repository; see `actmaps.maps.files.load`."""
        from .files import load

        return load(path_or_hub_id, filename=filename, revision=revision)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the map with a model card to a hub repository; see `actmaps.maps.hub.push_to_hub`."""
        from .hub import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def select(self, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None) -> ActMap:
        """The sites that match `include` (suffix list or full-match regex, None = all) and not `exclude`.

        Raises:
            ValueError: if a pattern matches nothing, or nothing remains.
        """
        kept = list(self) if include is None else match_sites(list(self), include)
        if exclude is not None:
            dropped = set(match_sites(list(self), exclude))
            kept = [site for site in kept if site not in dropped]
        if not kept:
            raise ValueError(f"no site of act map {self.metadata.name!r} remains after include and exclude")
        costs = {site: cost for site, cost in self.metadata.costs.items() if site in set(kept)}
        return ActMap({site: self[site] for site in kept}, replace(self.metadata, costs=costs))

    def inverse(self) -> ActMap:
        """The map of the reverse direction, site by site. Raises ValueError where a scale is 0."""
        inverted = {}
        for site, affine in self.items():
            try:
                inverted[site] = affine.inverse()
            except ValueError as error:
                raise ValueError(f"{site}: {error}") from None
        return ActMap(inverted, replace(self.metadata, name=f"inverse of {self.metadata.name}", costs={}))

    def prune(self, keep: float) -> ActMap:
        """Keep the fraction `keep` of all units that move most; the others become the identity.

        A unit's size is `sqrt((scale - 1)^2 + shift^2)`, the root mean square displacement of a standard normal
        activation, which is what normalisation layers put out. Sites where no unit remains are left out.

        Raises:
            ValueError: unless 0 < keep <= 1.
        """
        if not 0 < keep <= 1:
            raise ValueError(f"keep is the fraction of units to keep, in (0, 1], got {keep}")
        sizes = {site: torch.hypot(affine.scale - 1, affine.shift) for site, affine in self.items()}
        flat = torch.cat(list(sizes.values()))
        largest = flat.topk(max(1, round(keep * flat.numel()))).indices
        kept_units = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, largest, True)
        pruned = {}
        for (site, affine), kept in zip(
            self.items(), kept_units.split([m.channels for m in self.values()]), strict=True
        ):
            if kept.any():
                scale, shift = torch.where(kept, affine.scale, 1.0), torch.where(kept, affine.shift, 0.0)
                pruned[site] = AffineMap(scale, shift, affine.lower, affine.upper)
        return ActMap(pruned, replace(self.metadata, costs={}))

    @staticmethod
    def blend(weights: Mapping[ActMap, float]) -> ActMap:
        """One map whose displacement is the weighted sum of the maps' displacements.

        With one map and weight w this is the map at strength w. Sites that a map lacks count as identity there.

        Raises:
            ValueError: if maps disagree on the units, the support or the spatial rule of a site.
        """
        if not weights:
            raise ValueError("blend needs at least one map")
        first = next(iter(weights))
        blended: dict[str, AffineMap] = {}
        for act_map, weight in weights.items():
            if act_map.metadata.spatial != first.metadata.spatial:
                raise ValueError(
                    "maps with different spatial rules cannot be blended; steer with {map: strength} instead"
                )
            for site, affine in act_map.items():
                if site not in blended:
                    blended[site] = affine.at(weight)
                    continue
                known = blended[site]
                if known.channels != affine.channels:
                    raise ValueError(f"{site} has {known.channels} units in one map, {affine.channels} in another")
                if not _same_support(known, affine):
                    raise ValueError(
                        f"the maps have different supports at {site}; steer with {{map: strength}} instead of blending"
                    )
                step = affine.at(weight)
                blended[site] = AffineMap(
                    known.scale + (step.scale - 1), known.shift + step.shift, known.lower, known.upper
                )
        name = " + ".join(f"{weight:g} {act_map.metadata.name}" for act_map, weight in weights.items())
        return ActMap(blended, replace(first.metadata, name=name, costs={}, recommended_strength=1.0))


def _same_support(one: AffineMap, other: AffineMap) -> bool:
    if one.lower is None or one.upper is None or other.lower is None or other.upper is None:
        return one.lower is other.lower
    return torch.equal(one.lower, other.lower) and torch.equal(one.upper, other.upper)

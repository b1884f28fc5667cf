"""Activation Transport maps: fit, store, combine and apply them. Needs torch, safetensors, greenlet and tqdm only."""

from .act_map import ActMap, ActMapMetadata
from .affine import AffineMap
from .fitting import fit_map
from .folding import Folded, fold
from .methods import ESTIMATORS, METHODS, Method
from .ranks import Ranks
from .sites import find_sites
from .steering import Steering, steer

__all__ = [
    "ESTIMATORS",
    "METHODS",
    "ActMap",
    "ActMapMetadata",
    "AffineMap",
    "Folded",
    "Method",
    "Ranks",
    "Steering",
    "find_sites",
    "fit_map",
    "fold",
    "steer",
]

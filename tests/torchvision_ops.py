"""Lets a torchvision without operators import beside a CPU build of torch, as on machines that have no matching pair."""

from importlib.util import find_spec

import torch

_LIBRARIES: list[torch.library.Library] = []  # a definition lives as long as its library


def define_missing() -> None:
    """Declare the operators that torchvision's import looks up, unless its own extension brings them."""
    spec = find_spec("torchvision")
    if spec is None or _LIBRARIES:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)

"""Tests against real ComfyUI: they run where COMFYUI_DIR names a checkout, and are skipped loudly elsewhere."""

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
COMFYUI_DIR = os.environ.get("COMFYUI_DIR", "")
PRESENT = Path(COMFYUI_DIR, "main.py").is_file() and Path(COMFYUI_DIR, "comfy").is_dir()
REASON = (
    f"COMFYUI_DIR {'is not set' if not COMFYUI_DIR else 'names no checkout of ComfyUI'}: nothing in this file was run against "
    "real ComfyUI; CONTRIBUTING.md tells how to set it up"
)

if PRESENT:
    # ComfyUI's folder comes first, since its module `nodes` and our package have the same name.
    sys.path[:0] = [COMFYUI_DIR, str(HERE)]
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()


class AbsentComfyUI(pytest.Module):
    """Stands for a test module that cannot be imported without ComfyUI."""

    def collect(self):
        pytest.skip(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if module_path.is_relative_to(HERE) and not PRESENT:
        return AbsentComfyUI.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.comfyui)


@pytest.fixture(scope="module")
def demo():
    """MODEL, CLIP and VAE of the demo model."""
    from actmaps.nodes.demo_model import load_demo_model

    return load_demo_model()


@pytest.fixture(scope="module")
def pipeline():
    """The demo model in diffusers."""
    from actmaps.demo import load_pipeline

    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A live server; it starts once, in about 20 seconds."""
    from live_server import Server

    live = Server(tmp_path_factory.mktemp("comfyui"), COMFYUI_DIR)
    try:
        live.wait()
        yield live
    finally:
        live.stop()

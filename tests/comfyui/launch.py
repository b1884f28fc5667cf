"""Starts ComfyUI's own main.py, arguments and all; beside a CPU build of torch its torchvision needs help to import."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torchvision_ops

torchvision_ops.define_missing()
folder = Path.cwd()
sys.path[0] = str(folder)
runpy.run_path(str(folder / "main.py"), run_name="__main__")

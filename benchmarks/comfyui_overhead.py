"""What an applied map costs in ComfyUI: time of a sampling run with it against the same run without it.

    COMFYUI_DIR=/path/to/ComfyUI python benchmarks/comfyui_overhead.py
    COMFYUI_DIR=/path/to/ComfyUI python benchmarks/comfyui_overhead.py --model sd15 --size 32 --steps 10

Plain and steered runs alternate, in random order; the ratio is the median over rounds, of processor time. The demo model is the hardest
case: its layers are so small that the calls count, not the arithmetic. `sd15` is a randomly initialised U-Net of Stable Diffusion
1.5's shape at a reduced width.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

TARGET_RATIO = 1.03


def import_comfyui() -> None:
    """Make ComfyUI's modules importable, on the CPU where there is no GPU."""
    folder = os.environ.get("COMFYUI_DIR", "")
    if not (Path(folder) / "comfy").is_dir():
        sys.exit("set COMFYUI_DIR to a checkout of ComfyUI whose requirements are installed; see CONTRIBUTING.md")
    sys.path.insert(0, folder)
    arguments, sys.argv = sys.argv, sys.argv[:1]
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    sys.argv = arguments


def sd15(width: int) -> tuple[Any, Any]:
    """A random model of Stable Diffusion 1.5's shape, and random conditioning for it."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    config = comfy.supported_models.SD15(
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": width, "num_res_blocks": [2] * 4,
            "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
            "transformer_depth_output": [1] * 9 + [0] * 3, "context_dim": 768, "num_heads": 8, "use_spatial_transformer": True,
            "dims": 2, "legacy": False, "use_linear_in_transformer": False, "dtype": torch.float32, "adm_in_channels": None,
        }
    )  # fmt: skip
    device = comfy.model_management.get_torch_device()
    torch.manual_seed(0)
    model = config.get_model({}, device=device).eval().requires_grad_(False)
    patcher = comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())
    return patcher, [[torch.randn(1, 77, 768), {}]]


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "sd15"), default="demo")
    parser.add_argument("--width", type=int, default=128, help="first width of the sd15 model (the real one has 320)")
    parser.add_argument("--size", type=int, default=8, help="height and width of the latents")
    parser.add_argument("--batch", type=int, default=4, help="pictures per run")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument(
        "--end-percent", type=float, default=0.6, help="the map acts to here; the nodes' default is 0.6"
    )
    parser.add_argument("--repeats", type=int, default=25, help="rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()

    import_comfyui()
    import comfy.sample
    import torch

    from actmaps.maps import ActMap, AffineMap
    from actmaps.nodes.demo_model import load_demo_model
    from actmaps.nodes.steering import AppliedMap, steered_model
    from actmaps.nodes.translation import denoiser_places

    torch.set_num_threads(options.threads)
    if options.model == "demo":
        model, clip, _ = load_demo_model()
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("red apple", ""))
    else:
        model, positive = sd15(options.width)
        negative = [[torch.zeros_like(positive[0][0]), {}]]
    places = {site: place for site, place in denoiser_places(model.model).items() if place.is_norm}
    act_map = ActMap(
        {s: AffineMap(torch.full((p.unit_count,), 1.01), torch.full((p.unit_count,), 0.01)) for s, p in places.items()}
    )
    models = {
        "plain": model,
        "steered": steered_model(model, AppliedMap(act_map, end_percent=options.end_percent)),
        "steered throughout": steered_model(model, AppliedMap(act_map)),
    }
    latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros(options.batch, 4, options.size, options.size))
    noise = comfy.sample.prepare_noise(latent, 0)

    def run(name: str) -> float:
        started = time.process_time()  # of the processor: what else the machine does does not count
        comfy.sample.sample(
            models[name], noise, options.steps, options.cfg, "euler", "simple", positive, negative, latent,
            disable_pbar=True, seed=0,
        )  # fmt: skip
        return time.process_time() - started

    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for name in models:
            run(name)  # warm up
        for _ in range(options.repeats):
            for name in random.sample(list(models), len(models)):
                times[name].append(run(name))
    figures: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {options.threads} thread(s)",
        "torch": torch.__version__,
        "run": f"{options.model}, {options.steps} steps, cfg {options.cfg:g}, batch {options.batch}, {len(act_map)} sites",
        "processor seconds": {name: round(median(taken), 4) for name, taken in times.items()},
        "ratio": {
            name: round(median(a / b for a, b in zip(taken, times["plain"], strict=True)), 4)
            for name, taken in times.items()
            if name != "plain"
        },
        "target": TARGET_RATIO,
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

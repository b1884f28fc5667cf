"""The paper's public code, imported from a checkout of github.com/apple/ml-act: its hooks, and its scripts for fitting.

Nothing of it is replaced but the progress bar and, for models that draw, the noise, so that both sides see the same.
"""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from actmaps.maps import AffineMap

NAMES = {"linear": "linear_ot", "mean": "mean_ot", "gaussian": "gaussian_ot"}
SUPPORTS = {"all": "q_all", "observed": "q_0_100"}


def use_checkout(folder: Path | None) -> None:
    """Make `act`, the reference's package, importable from `folder`; exits with advice if it is not there."""
    how = "git clone https://github.com/apple/ml-act, and give its folder as --reference"
    if folder is None:
        sys.exit(f"--reference is missing: {how}")
    if not (folder / "act" / "hooks" / "transport.py").is_file():
        sys.exit(f"--reference {folder} is no checkout of the reference, act/hooks/transport.py is not in it: {how}")
    sys.path.insert(0, str(folder.resolve()))


def reference_module(name: str) -> Any:
    """A module of the reference; exits with the name of the package that it lacks."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        packages = {"sklearn": "scikit-learn", "hydra": "hydra-core", "omegaconf": "hydra-core"}
        missing = (error.name or "").split(".")[0]
        sys.exit(
            f"the reference's {name} imports {missing}, which is not installed: pip install {packages.get(missing, missing)}"
            " (what it needs here in all: scikit-learn, and for --part fitting hydra-core, wandb and pandas)"
        )


def fitted_hook(method: str, source: Tensor, target: Tensor, *, support: str = "all", strength: float = 1.0) -> Any:
    """Its hook, fitted on samples (n, C) and (m, C)."""
    hook = reference_module("act.hooks").get_hook(
        NAMES[method],
        module_name="site",
        device=str(source.device),
        dtype=torch.float32,
        intervention_position="all",
        strength=strength,
        quantiles_src=SUPPORTS[support],
    )
    labels = torch.cat([torch.ones(len(source)), torch.zeros(len(target))]).to(source.device)
    hook.fit(responses=torch.cat([source, target]), labels=labels)
    return hook


def as_affine(hook: Any) -> AffineMap:
    """The map that a fitted hook applies; units that it leaves out get the identity. With the bounds of its support, if it has one."""
    if hasattr(hook, "net"):
        scale, shift = hook.net.w1[0].detach(), hook.net.b1[0].detach()
    else:
        slope = torch.ones_like(hook.std1) if hook.onlymean else hook.std2 / hook.std1
        scale = torch.where(hook.mask, slope, 1.0)
        shift = torch.where(hook.mask, hook.mu2 - slope * hook.mu1, 0.0)
    if not isinstance(hook.quantiles_src[0], Tensor):
        return AffineMap(scale.cpu(), shift.cpu())
    return AffineMap(scale.cpu(), shift.cpu(), *(bound.float().cpu() for bound in hook.quantiles_dict_src["q_0_100"]))


def map_difference(one: AffineMap, other: AffineMap) -> float:
    """The largest difference of scale or shift, relative to the largest of its kind (at least 1)."""
    pairs = ((one.scale, other.scale), (one.shift, other.shift))
    return max(float((a.cpu() - b.cpu()).abs().max() / b.abs().max().cpu().clamp_min(1)) for a, b in pairs)


@dataclass(frozen=True)
class Task:
    """What is fitted.

    Attributes:
        title: for the tables.
        sites: the reference's pattern of the modules.
        draws: whether the model is a pipeline that draws pictures; else it is a language model.
    """

    title: str
    sites: str
    draws: bool


class Fitting:
    """Its script `learn_intervention`, incremental: a pass over all prompts for every site, responses in files.

    Args:
        checkout: folder of the reference.
        folder: an empty folder for its files.
        model: folder of a model saved with `save_pretrained`.
        prompts: prompts of the subsets "source" and "target".
        task: what to fit.
        batch_size: prompts of a batch.
        device: where the model runs.
    """

    def __init__(
        self,
        checkout: Path,
        folder: Path,
        model: Path,
        prompts: dict[str, list[str]],
        task: Task,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.script = reference_module("act.scripts.learn_intervention")
        hydra = reference_module("hydra")
        self.script.tqdm = partial(self.script.tqdm, disable=True)  # it would print a line for every site
        self.folder = folder / "cache"
        texts = folder / "prompts.json"
        texts.write_text(json.dumps(prompts))
        presets = ("diffusion_prompts", "SDXL-Lightning") if task.draws else ("giraffes", "gpt2")
        with hydra.initialize_config_dir(str((checkout / "act" / "configs").resolve()), version_base="1.3"):
            config = hydra.compose(
                "text_to_image_generation" if task.draws else "text_generation",
                overrides=[
                    f"task_params={presets[0]}",
                    f"model={presets[1]}",
                    "intervention_params=linear_ot",
                    "intervention_params.hook_params.quantiles_src=q_all",
                    f"device={device}",
                    f"data_dir={folder}",
                    f"cache_dir={self.folder}",
                    f"batch_size={batch_size}",
                    f"model.model_path={model}",
                    f"model.module_names=['{task.sites}']",
                    f"task_params.dataset_params.json_path={texts}",
                    "task_params.src_subsets=[source]",
                    "task_params.dst_subsets=[target]",
                    "responses.num_workers=0",  # a process for every pass would cost it more
                    "responses.intervention_params.hook_params.raise_exception=true",  # as the script sets it
                ],
            )
        self.responses = self.script.ResponsesManager(config.responses)
        self.interventions = self.script.InterventionsManager(
            self.script.ResponsesManager.get_output_path(config.responses), config.interventions
        )

    @property
    def model(self) -> Any:
        """The model or pipeline that it runs."""
        return self.responses.model.module

    def run(self) -> None:
        """Fit all sites."""
        self.interventions.learn_intervention_all_incremental(self.responses)
        self.responses.model.remove_hooks()

    def sites(self) -> list[str]:
        """Names of its modules, in the order in which it fits them."""
        return self.responses.get_module_names(self.responses.cfg.model_params.module_names)

    def maps(self) -> dict[str, AffineMap]:
        """What it fitted, by module name."""
        maps = {}
        for name in self.sites():
            state = torch.load(self.interventions.output_path / f"{name}.statedict", weights_only=True)
            maps[name] = AffineMap(state["net.w1"][0], state["net.b1"][0])
        return maps

    def disk(self) -> tuple[int, int]:
        """Files that it left, and their bytes."""
        sizes = [file.stat().st_size for file in self.folder.rglob("*") if file.is_file()]
        return len(sizes), sum(sizes)


class NoiseByPrompt(StableDiffusionPipeline):
    """Draws every prompt from noise of its own. The reference draws new noise at every pass, so that no two of its runs agree."""

    def __call__(self, prompt: list[str], **options: Any) -> Any:
        size = self.unet.config.sample_size
        noise = [
            torch.randn(4, size, size, generator=torch.Generator().manual_seed(zlib.crc32(p.encode()))) for p in prompt
        ]
        return super().__call__(prompt, latents=torch.stack(noise).to(self.unet.device), **options)

"""Train the demo model: `python -m actmaps.demo.train all --work RUN`.

Stages, each of which goes on where it stopped: `tokenizer` (seconds), `vae`, `unet` (text encoder and UNet together), `decoder` (the
VAE's decoder again, on fixed latents), `export`. A stage's length is given in steps or in minutes; the learning rate is annealed
over it either way. Every step draws its randomness from (seed, step), so that an interrupted run and an uninterrupted one of the
same number of steps end in the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import dataset as data
from . import model as parts


@dataclass
class Budget:
    """How long a stage runs: `steps`, or `minutes` of wall time (the time of earlier, interrupted runs counts)."""

    steps: int | None = None
    minutes: float | None = None
    spent: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give a stage either steps or minutes")

    def elapsed(self) -> float:
        """Seconds, earlier runs included."""
        return self.spent + time.monotonic() - self._started

    def progress(self, step: int) -> float:
        """Share of the budget that is spent: 0 at the start, 1 at the end."""
        return step / self.steps if self.steps is not None else self.elapsed() / (self.minutes * 60)


def learning_rate(peak: float, step: int, progress: float, warmup: int) -> float:
    """Linear warm-up, a plateau over the first half of the budget, then a linear descent to zero."""
    return peak * min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, 2 * (1 - progress)))


class Average:
    """Exponential moving average of a module's parameters, with warm-up."""

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's present weights; faster during the first steps."""
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), list(module.parameters()), rate)


class Run:
    """The loop that the VAE and the denoiser share: schedule, average, checkpoints, log, stopping.

    Args:
        name: stage; files are `work/<name>.ckpt` and `work/<name>.jsonl`.
        module: trained in place.
        loss: step -> scalar loss; draws its own randomness from the step.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        loss: Callable[[int], Tensor],
        work: Path,
        budget: Budget,
        *,
        peak: float,
        weight_decay: float = 0.01,
        warmup: int = 100,
        decay: float = 0.999,
        clip: float = 1.0,
    ):
        self.name, self.module, self.loss, self.work, self.budget = name, module, loss, work, budget
        self.peak, self.warmup, self.clip = peak, warmup, clip
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=peak, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True
        )
        self.average = Average(module, decay)
        self.step = 0
        self._stop = False

    @property
    def checkpoint(self) -> Path:
        """The stage's checkpoint file."""
        return self.work / f"{self.name}.ckpt"

    def resume(self) -> bool:
        """Load the stage's checkpoint if there is one."""
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in self.average.weights.items():
            value.copy_(state["average"][name])
        self.step, self.budget.spent = state["step"], state["seconds"]
        return True

    def save(self) -> None:
        """Write the checkpoint under a temporary name, then rename."""
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.weights,
            "step": self.step,
            "seconds": self.budget.elapsed(),
        }
        temporary = self.checkpoint.with_suffix(".part")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)

    @torch.no_grad()
    def load_average(self) -> nn.Module:
        """Put the averaged weights into the module and return it."""
        for name, value in self.module.named_parameters():
            value.copy_(self.average.weights[name])
        return self.module

    def request_stop(self, *_: Any) -> None:
        """Finish the current step, write a checkpoint and leave (the handler of SIGTERM and SIGINT)."""
        self._stop = True

    def train(
        self, every: int = 500, on_interval: Callable[[int], None] | None = None, limit: int | None = None
    ) -> bool:
        """Run until the budget is spent; returns whether it was. Checkpoints and calls `on_interval` every so many steps.

        Args:
            limit: leave after this step, as if interrupted.
        """
        before = {number: signal.signal(number, self.request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._train(every, on_interval, limit)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _train(self, every: int, on_interval: Callable[[int], None] | None, limit: int | None) -> bool:
        from tqdm import tqdm

        self.module.train()
        losses: list[float] = []
        with tqdm(desc=self.name, initial=self.step, total=self.budget.steps, unit="step") as bar:
            while (progress := self.budget.progress(self.step)) < 1:
                if self._stop or self.step == limit:
                    self.save()
                    return False
                rate = learning_rate(self.peak, self.step, progress, self.warmup)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                loss = self.loss(self.step)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
                self.optimizer.step()
                self.average.update(self.module, self.step)
                self.step += 1
                losses.append(loss.item())
                bar.update()
                if self.step % 50 == 0:
                    self._log(losses, rate, progress, bar)
                    losses = []
                if self.step % every == 0:
                    self.save()
                    if on_interval:
                        on_interval(self.step)
        self.save()
        return True

    def _log(self, losses: list[float], rate: float, progress: float, bar: Any) -> None:
        seconds = self.budget.elapsed()
        row = {"step": self.step, "loss": sum(losses) / len(losses), "lr": rate, "seconds": round(seconds, 1)}
        with open(self.work / f"{self.name}.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        left = seconds / max(progress, 1e-6) - seconds
        bar.set_postfix(loss=f"{row['loss']:.4f}", left=f"{left / 60:.0f} min")


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# Autoencoder ---------------------------------------------------------------------------------------------------------


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of pixels and of their horizontal and vertical differences, which keeps outlines crisp."""
    error = output - target
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 0.5 * (across + down) + error.square().mean()


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def autoencoder_run(
    images: np.ndarray,
    work: Path,
    budget: Budget,
    *,
    vae: nn.Module,
    seed: int = 0,
    batch: int = 8,
    peak: float = 1.5e-3,
    device: str = "cpu",
) -> Run:
    """The VAE's training run.

    Args:
        images: uint8 (N, 64, 64, 3), training images only.
        vae: an AutoencoderKL, trained in place.
    """
    vae = vae.to(device, memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        generator = _generator(seed, step)
        rows = torch.randint(len(images), (batch,), generator=generator)
        pixels = to_pixels(images[rows.numpy()])
        flipped = torch.rand(batch, generator=generator) < 0.5
        pixels[flipped] = pixels[flipped].flip(-1)
        pixels = pixels.to(device, memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        latents = posterior.mean + posterior.std * noise
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return reconstruction_loss(vae.decode(latents).sample, pixels) + 2e-4 * divergence

    return Run("vae", vae, loss, work, budget, peak=peak, weight_decay=0.0, decay=0.998)


def decoder_run(
    images: np.ndarray,
    latents: Tensor,
    work: Path,
    budget: Budget,
    *,
    vae: nn.Module,
    seed: int = 0,
    batch: int = 8,
    peak: float = 1e-3,
    device: str = "cpu",
) -> Run:
    """Train only the VAE's decoder, on fixed latents with noise: generated latents are never quite on the spot.

    Args:
        images: uint8 (N, 64, 64, 3).
        latents: (N, C, h, w), their standardised latents.
        vae: an AutoencoderKL; its decoder is trained in place, its encoder stays as it is.
    """
    decoder = nn.Sequential(vae.post_quant_conv, vae.decoder).to(device, memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        generator = _generator(seed + 2, step)
        rows = torch.randint(len(images), (batch,), generator=generator)
        spread = 0.3 * torch.rand(batch, 1, 1, 1, generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator) * spread
        pixels = to_pixels(images[rows.numpy()]).to(device, memory_format=torch.channels_last)
        return reconstruction_loss(decoder((latents[rows] + noise).to(device)), pixels)

    return Run("decoder", decoder, loss, work, budget, peak=peak, weight_decay=0.0, decay=0.998)


@torch.no_grad()
def encode_all(vae: nn.Module, images: np.ndarray, device: str = "cpu", batch: int = 128) -> Tensor:
    """(N, C, h, w): the posterior means of all images."""
    chunks = [
        vae.encode(to_pixels(images[start : start + batch]).to(device)).latent_dist.mean.cpu()
        for start in range(0, len(images), batch)
    ]
    return torch.cat(chunks)


# Text encoder and UNet -----------------------------------------------------------------------------------------------


def denoiser_run(
    records: list[data.Record],
    latents: Tensor,
    tokenizer: Any,
    work: Path,
    budget: Budget,
    *,
    denoiser: parts.Denoiser,
    seed: int = 0,
    batch: int = 48,
    peak: float = 1e-3,
    device: str = "cpu",
) -> Run:
    """The diffusion training run: velocity prediction on standardised latents.

    Args:
        latents: (len(records), C, h, w) in the records' order.
        denoiser: trained in place.
    """
    denoiser = denoiser.to(device, memory_format=torch.channels_last)
    alphas = parts.build_scheduler().alphas_cumprod
    signal_rate, noise_rate = alphas.sqrt()[:, None, None, None], (1 - alphas).sqrt()[:, None, None, None]

    def loss(step: int) -> Tensor:
        generator, rng = _generator(seed + 1, step), random.Random(f"{seed}-{step}")
        rows = torch.randint(len(records), (batch,), generator=generator)
        tokens = parts.tokenize(tokenizer, [data.sample_caption(records[row], rng) for row in rows.tolist()])
        # Stratified, which makes the loss less noisy, and denser where there is more noise: measured by the loss with a wrong
        # caption, the words for the subject matter several times as much above timestep 500 as below 350.
        offsets = ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch).sqrt()
        timesteps = (offsets * len(alphas)).long()[torch.randperm(batch, generator=generator)]
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        noisy = signal_rate[timesteps] * clean + noise_rate[timesteps] * noise
        velocity = signal_rate[timesteps] * noise - noise_rate[timesteps] * clean
        prediction = denoiser(noisy.to(device), timesteps.to(device), tokens.to(device))
        return nn.functional.mse_loss(prediction, velocity.to(device))

    return Run("unet", denoiser, loss, work, budget, peak=peak)


# Stages --------------------------------------------------------------------------------------------------------------


def caption_corpus(records: list[data.Record], seed: int = 0) -> list[str]:
    """Sampled captions of the records, for learning the tokenizer's merges."""
    rng = random.Random(seed)
    return [data.sample_caption(record, rng) for record in records for _ in range(3)]


def stage_tokenizer(work: Path, dataset: data.Dataset) -> None:
    """Learn the tokenizer: `work/tokenizer`."""
    if not (work / "tokenizer").exists():
        parts.train_tokenizer(caption_corpus(dataset.select("train"))).save_pretrained(work / "tokenizer")


def stage_vae(work: Path, dataset: data.Dataset, budget: Budget, options: argparse.Namespace) -> None:
    """Train the autoencoder and standardise its latents: `work/vae`."""
    from diffusers import AutoencoderKL

    if (work / "vae").exists():
        return
    torch.manual_seed(options.seed)
    vae = AutoencoderKL.from_pretrained(options.init_from, subfolder="vae") if options.init_from else parts.build_vae()
    records = dataset.select("train")
    images = np.ascontiguousarray(dataset.images[[record.image for record in records]])
    run = autoencoder_run(images, work, budget, vae=vae, seed=options.seed, device=options.device)
    run.resume()
    if not run.train(
        every=options.every, on_interval=lambda step: preview(vae, dataset, work / f"vae-{step:06d}.png")
    ):
        raise SystemExit("stopped before the end: run the same command again to go on")
    run.load_average()
    preview(vae, dataset, work / f"vae-{run.step:06d}.png")
    vae.eval()
    latents = encode_all(vae, images, options.device)
    parts.standardise_latents(vae.float().cpu(), latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    vae.save_pretrained(work / "vae")


def _load_frozen(work: Path) -> tuple[Any, Any]:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    tuned = work / "vae-tuned"
    vae = AutoencoderKL.from_pretrained(tuned if tuned.exists() else work / "vae")
    return CLIPTokenizer.from_pretrained(work / "tokenizer"), vae.eval()


def stage_decoder(work: Path, dataset: data.Dataset, budget: Budget, options: argparse.Namespace) -> None:
    """Train the decoder further while latents stay as they are: `work/vae-tuned`. May run before or after the UNet."""
    from diffusers import AutoencoderKL

    if (work / "vae-tuned").exists():
        return
    vae = AutoencoderKL.from_pretrained(work / "vae").to(options.device)
    records = dataset.select("train")
    images = np.ascontiguousarray(dataset.images[[record.image for record in records]])
    latents = encode_all(vae, images, options.device)
    run = decoder_run(images, latents, work, budget, vae=vae, seed=options.seed, device=options.device)
    run.resume()
    if not run.train(
        every=options.every, on_interval=lambda step: preview(vae, dataset, work / f"decoder-{step:06d}.png")
    ):
        raise SystemExit("stopped before the end: run the same command again to go on")
    run.load_average()
    preview(vae, dataset, work / f"decoder-{run.step:06d}.png")
    vae.float().cpu().save_pretrained(work / "vae-tuned")


def stage_unet(work: Path, dataset: data.Dataset, budget: Budget, options: argparse.Namespace) -> None:
    """Train text encoder and UNet on the latents: `work/unet.ckpt`."""
    tokenizer, vae = _load_frozen(work)
    torch.manual_seed(options.seed)
    denoiser = parts.build_denoiser(tokenizer)
    if options.init_from:
        load_denoiser(denoiser, options.init_from)
    records = dataset.select("train")
    latents = encode_all(vae.to(options.device), dataset.images[[record.image for record in records]], options.device)
    run = denoiser_run(
        records, latents, tokenizer, work, budget, denoiser=denoiser, seed=options.seed, device=options.device
    )
    run.resume()

    def picture(step: int) -> None:
        averaged = averaged_denoiser(run)
        save_sheet(sample_sheet(tokenizer, averaged, vae.cpu()), work / f"unet-{step:06d}.png", columns=10)
        if options.export and step % options.export_every == 0:
            parts.save_weights(options.export, tokenizer, averaged, vae)

    if not run.train(every=options.every, on_interval=picture):
        raise SystemExit("stopped before the end: run the same command again to go on")
    picture(run.step)


def averaged_denoiser(run: Run) -> parts.Denoiser:
    """A copy of the run's text encoder and UNet on the CPU with the averaged weights."""
    from copy import deepcopy

    copy = deepcopy(run.module).cpu().eval()
    copy.load_state_dict(run.average.weights, strict=False)
    return copy


def load_denoiser(denoiser: parts.Denoiser, weights: str | Path) -> None:
    """Copy text encoder and UNet of a saved pipeline into `denoiser`."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    denoiser.text_encoder.load_state_dict(
        CLIPTextModel.from_pretrained(weights, subfolder="text_encoder").float().state_dict()
    )
    denoiser.unet.load_state_dict(UNet2DConditionModel.from_pretrained(weights, subfolder="unet").float().state_dict())


def stage_export(work: Path, out: Path) -> None:
    """Write the averaged weights of the latest checkpoint as a pipeline folder."""
    tokenizer, vae = _load_frozen(work)
    denoiser = parts.build_denoiser(tokenizer)
    state = torch.load(work / "unet.ckpt", weights_only=True, map_location="cpu")
    denoiser.load_state_dict(state["average"], strict=False)
    parts.save_weights(out, tokenizer, denoiser, vae)
    print(f"step {state['step']}, {state['seconds'] / 60:.0f} minutes of training: {out}")


# Pictures ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def preview(vae: Any, dataset: data.Dataset, path: Path) -> None:
    """A sheet of 48 held-out images beside their reconstructions."""
    rows = [record.image for record in dataset.select("held_out_concept")[::31][:48]]
    pixels = to_pixels(dataset.images[rows])
    output = vae.decode(vae.encode(pixels.to(vae.device)).latent_dist.mean).sample.cpu()
    save_sheet(torch.stack((pixels, output), 1).flatten(0, 1), path, columns=16)


SHEET_SUBJECTS = ("red apple", "dog face", "grinning face with a hat", "sailboat")


def sample_sheet(tokenizer: Any, denoiser: parts.Denoiser, vae: Any, steps: int = 20, guidance: float = 4.0) -> Tensor:
    """(N, 3, 64, 64) in -1..1: four subjects, each without style words and in every style."""
    from diffusers import StableDiffusionPipeline

    pipeline = parts.build_pipeline(StableDiffusionPipeline, tokenizer, denoiser, vae)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [
        prompt for subject in SHEET_SUBJECTS for prompt in (subject, *(f"{subject}, {style}" for style in data.STYLES))
    ]
    images = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def save_sheet(pictures: Tensor, path: Path, columns: int) -> None:
    """Write (N, 3, H, W) pictures in -1..1 as one PNG with `columns` per row."""
    from PIL import Image

    count, _, height, width = pictures.shape
    sheet = Image.new("RGB", (columns * (width + 2), -(-count // columns) * (height + 2)), "grey")
    values = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for index, picture in enumerate(values):
        sheet.paste(Image.fromarray(picture), ((index % columns) * (width + 2), (index // columns) * (height + 2)))
    sheet.save(path)


def main() -> None:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tokenizer", "vae", "unet", "decoder", "export", "all"))
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints, logs and pictures")
    parser.add_argument("--data", type=Path, default=None, help="rendered data set (default: the cache)")
    parser.add_argument("--out", type=Path, default=parts.WEIGHTS, help="where the export goes")
    parser.add_argument(
        "--export", type=Path, help="also export every --export-every steps while training, to this folder"
    )
    parser.add_argument("--export-every", type=int, default=1000)
    parser.add_argument("--vae-minutes", type=float, default=20)
    parser.add_argument("--minutes", type=float, default=90, help="wall time of the UNet stage")
    parser.add_argument("--vae-steps", type=int, help="steps of the VAE stage, instead of minutes")
    parser.add_argument("--decoder-minutes", type=float, default=20)
    parser.add_argument("--decoder-steps", type=int, help="steps of the decoder stage, instead of minutes")
    parser.add_argument("--steps", type=int, help="steps of the UNet stage, instead of minutes")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints and sample pictures")
    parser.add_argument(
        "--init-from", type=Path, help="start from the weights of a saved pipeline, for example the shipped ones"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    stages = ("tokenizer", "vae", "unet", "decoder", "export") if options.stage == "all" else (options.stage,)
    dataset = data.load(options.data) if stages != ("export",) else None
    for stage in stages:
        if stage == "tokenizer":
            stage_tokenizer(options.work, dataset)
        elif stage == "vae":
            minutes = None if options.vae_steps else options.vae_minutes
            stage_vae(options.work, dataset, Budget(options.vae_steps, minutes), options)
        elif stage == "decoder":
            minutes = None if options.decoder_steps else options.decoder_minutes
            stage_decoder(options.work, dataset, Budget(options.decoder_steps, minutes), options)
        elif stage == "unet":
            minutes = None if options.steps else options.minutes
            stage_unet(options.work, dataset, Budget(options.steps, minutes), options)
        else:
            stage_export(options.work, options.out)


if __name__ == "__main__":
    main()

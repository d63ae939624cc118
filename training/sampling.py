"""Pictures from a base, with or without an adapter on it: prompts and seeds in, uint8 pixels out.

Plain DDIM with the base's own noise schedule. The same prompt, seed and weights give the same
picture whatever else was drawn before: the global random state is neither read nor changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray
from torch import Tensor

from captioning import UserError
from training.families import Base

# Text embeddings of a loaded base, by prompt: a sweep asks the same prompts at every checkpoint.
# They go with the base. (The recipe trains no text encoder, so they stay true.)
_text_embeddings: WeakKeyDictionary[Base, dict[str, Tensor]] = WeakKeyDictionary()


def sample(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    size_px: int | None = None,
    batch: int = 8,
    negative: str = "",
) -> NDArray[np.uint8]:
    """One picture per prompt, `prompts[i]` from the noise of `seeds[i]`.  # (N, H, W, 3)

    `guidance` w gives `u + w·(c - u)` (Ho & Salimans 2022, in diffusers' convention), with both
    halves in one UNet batch; w = 1 leaves the unconditional half out. Noise is drawn on the CPU,
    so that it is the same on every device. Raises ValueError if the lengths differ, UserError for
    a size that the VAE cannot divide.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts, but {len(seeds)} seeds")
    size_px = size_px or base.native_size_px
    if size_px % base.vae_factor:
        raise UserError(
            "scoring: size_px",
            f"{size_px} px is not a multiple of the VAE's factor {base.vae_factor}",
            f"use {max(1, round(size_px / base.vae_factor)) * base.vae_factor}",
        )
    pictures = []
    with _ready(base):
        for start in range(0, len(prompts), batch):
            chunk = slice(start, start + batch)
            noise = initial_noise(base, seeds[chunk], size_px)
            text = _embed(base, prompts[chunk])
            empty = _embed(base, [negative])
            latents = _denoise(base, noise, text, empty, steps, guidance)
            pictures.append(_to_uint8(base.decode(latents)))
    if not pictures:
        return np.zeros((0, size_px, size_px, 3), np.uint8)
    return np.concatenate(pictures)


def initial_noise(base: Base, seeds: Sequence[int], size_px: int) -> Tensor:
    """Standard normal latents, each from its own seed, on the CPU.  # (N, C, h, w)"""
    side = size_px // base.vae_factor
    shape = (base.latent_channels, side, side)
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def sampling_scheduler(base: Base) -> DDIMScheduler:
    """DDIM (Song et al. 2021) with the betas, spacing and prediction type of the base's config.

    `clip_sample` and `thresholding` clamp pixels; latents have no such range, so both are off even
    where a config forgot to say so.
    """
    return DDIMScheduler.from_pretrained(
        base.folder,
        subfolder="scheduler",
        local_files_only=True,
        clip_sample=False,
        thresholding=False,
    )


def _denoise(
    base: Base, noise: Tensor, text: Tensor, empty: Tensor, steps: int, guidance: float
) -> Tensor:
    scheduler = sampling_scheduler(base)
    scheduler.set_timesteps(steps, device=base.device)
    latents = noise.to(base.device) * scheduler.init_noise_sigma  # (N, C, h, w)
    guided = guidance != 1
    if guided:
        text = torch.cat([empty.expand(len(text), -1, -1), text])  # (2N, T, D)
    for timestep in scheduler.timesteps:
        inputs = torch.cat([latents, latents]) if guided else latents
        output = base.predict(inputs, timestep.expand(len(inputs)), text)
        if guided:
            without, with_text = output.chunk(2)
            output = without + guidance * (with_text - without)
        latents = scheduler.step(output, timestep, latents, eta=0.0).prev_sample
    return latents


def _embed(base: Base, prompts: Sequence[str]) -> Tensor:
    """Text embeddings, computed once per base and prompt.  # (N, T, D)"""
    known = _text_embeddings.setdefault(base, {})
    missing = sorted({prompt for prompt in prompts if prompt not in known})
    if missing:
        known.update(zip(missing, base.encode_prompts(missing), strict=True))
    return torch.stack([known[prompt] for prompt in prompts])


def _to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """(N, 3, H, W) in -1..1 to (N, H, W, 3) in 0..255."""
    scaled = ((pixels.clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@contextmanager
def _ready(base: Base) -> Iterator[None]:
    """No gradients and no dropout; all put back afterwards."""
    training = base.unet.training
    base.unet.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        base.unet.train(training)

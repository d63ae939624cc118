"""Pictures from a base, with or without an adapter on it: prompts and seeds in, uint8 pixels out.

By the family's plain sampler: DDIM with the base's noise schedule, Euler for flows. The same
prompt, seed and weights give the same picture whatever else was drawn before: the global random
state is neither read nor changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captioning import UserError
from training.data.buckets import refuse_other_size
from training.families import Base, Conditions
from training.families.compiled_blocks import uncompiled
from training.frozen.sharding import is_sharded
from training.pack.out_of_memory import first_words, free_cached, is_out_of_memory

# Text embeddings of a loaded base, by prompt: a sweep asks the same prompts at every checkpoint.
# They go with the base. What an adapter on the text encoders makes of them is not kept.
_text_embeddings: WeakKeyDictionary[Base, dict[str, Conditions]] = WeakKeyDictionary()


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

    At most `batch` at once; when memory runs out, half as many, down to one, from there on. With a
    base that is shared out the first lack is raised: the other workers wait in the same pass.

    `guidance` w is that of `Base.guided`, with both halves in one batch; w = 1 leaves the
    unconditional half out. A base that is told the guidance (FLUX.1-dev, FLUX.2 [dev]) is told w,
    and `negative` has no place there. Noise is drawn on the CPU, so that it
    is the same on every device. Raises ValueError if the lengths differ, UserError for
    a size that the VAE cannot divide and when memory does not suffice for a single picture.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts, but {len(seeds)} seeds")
    side_px = size_px or base.native_size_px
    refuse_other_size("scoring: size_px", side_px, base.size_multiple_px)
    pictures: list[NDArray[np.uint8]] = []
    known = {} if base.text_is_adapted else _text_embeddings.setdefault(base, {})

    def draw(chunk: slice) -> NDArray[np.uint8]:
        noise = initial_noise(base, seeds[chunk], side_px)
        text = _embed(base, prompts[chunk], known)
        empty = _embed(base, [negative], known)
        of_picture = base.picture_conditions((side_px, side_px), (0, 0), (side_px, side_px))
        latents = _denoise(base, noise, text, empty, of_picture, steps, guidance)
        return _to_uint8(base.decode(latents))

    start = 0
    with _ready(base):
        while start < len(prompts):
            chunk = slice(start, min(start + batch, len(prompts)))
            try:
                pictures.append(draw(chunk))
                start = chunk.stop
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or is_sharded(base):
                    raise
                found = first_words(error)
            batch = (chunk.stop - start) // 2
            if batch == 0:
                raise UserError(
                    "scoring: size_px",
                    f"memory ran out ({found}) while a single picture of {side_px} px was drawn",
                    "lower it, or trials_per_pack in settings.yaml: the adapters of a pack and "
                    "their optimisers stay in memory meanwhile",
                )
            free_cached(base.device)
    if not pictures:
        return np.zeros((0, side_px, side_px, 3), np.uint8)
    return np.concatenate(pictures)


def initial_noise(base: Base, seeds: Sequence[int], size_px: int) -> Tensor:
    """Standard normal latents, each from its own seed, on the CPU.  # (N, C, h, w)"""
    side = size_px // base.vae_factor
    shape = (base.latent_channels, side, side)
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def _denoise(
    base: Base,
    noise: Tensor,
    text: Conditions,
    empty: Conditions,
    of_picture: Conditions,
    steps: int,
    guidance: float,
) -> Tensor:
    scheduler = base.sampler(steps, noise)
    # Flow schedulers have no such factor: their noise is standard normal.
    latents = noise.to(base.device) * getattr(scheduler, "init_noise_sigma", 1.0)  # (N, C, h, w)
    count = len(latents)
    guided = guidance != 1 and not base.guidance_embedded
    if guided:
        text = {
            name: torch.cat([empty[name].expand(count, *tensor.shape[1:]), tensor])  # (2N, ...)
            for name, tensor in text.items()
        }
    rows = 2 * count if guided else count
    conditions = dict(text)
    for name, tensor in of_picture.items():
        conditions[name] = tensor.to(base.device).expand(rows, *tensor.shape)
    if base.guidance_embedded:
        conditions["guidance"] = torch.full((rows,), guidance, device=base.device)
    for timestep in scheduler.timesteps:
        inputs = torch.cat([latents, latents]) if guided else latents
        output = base.predict(inputs, timestep.expand(rows), conditions)
        if guided:
            without, with_text = output.chunk(2)
            output = base.guided(without, with_text, guidance)
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


def _embed(base: Base, prompts: Sequence[str], known: dict[str, Conditions]) -> Conditions:
    """Text embeddings; those that are not `known` yet are computed and are so from now on.

    # (N, ...) each
    """
    missing = sorted({prompt for prompt in prompts if prompt not in known})
    if missing:
        found = base.encode_prompts(missing)
        for number, prompt in enumerate(missing):
            known[prompt] = {name: tensor[number].to(base.device) for name, tensor in found.items()}
    first = known[prompts[0]]
    return {name: torch.stack([known[prompt][name] for prompt in prompts]) for name in first}


def _to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """(N, 3, H, W) in -1..1 to (N, H, W, 3) in 0..255."""
    scaled = ((pixels.clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@contextmanager
def _ready(base: Base) -> Iterator[None]:
    """No gradients and no dropout; all put back afterwards."""
    training = base.denoiser.training
    base.denoiser.eval()
    try:
        with torch.no_grad(), uncompiled(base.denoiser):
            yield
    finally:
        base.denoiser.train(training)

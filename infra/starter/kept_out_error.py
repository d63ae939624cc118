"""The denoising error of a base on kept-out pictures: the quickest sign of whether it still learns.

Each picture gets one noise level and one noise, the same every time, so that two bases, or two
steps of one training, can be told apart by a few thousandths.
"""

from __future__ import annotations

import autoencoder
import captions
import diffusion
import diffusion_data
import numpy as np
import torch
from avatars import Avatar
from diffusers import StableDiffusionPipeline

SEED = 7
BATCH = 64
FIFTHS = 5
# A prime, so that neighbours in the set get noise levels far apart.
STRIDE = 617


@torch.no_grad()
def kept_out_error(
    pipe: StableDiffusionPipeline, pixels: np.ndarray, avatars: list[Avatar]
) -> list[float]:
    """Mean squared error of v in fifths of the noise schedule, the least noise first."""
    latents = torch.from_numpy(autoencoder.means(pipe.vae, pixels))  # (N, 16, 8, 8)
    alphas = diffusion.scheduler().alphas_cumprod
    count, end = len(latents), len(alphas)
    levels = torch.arange(count) * STRIDE % count * end // count
    texts = [
        captions.tag_caption(avatar) if number % 2 else captions.prose(avatar)
        for number, avatar in enumerate(avatars)
    ]
    draw, errors = torch.Generator().manual_seed(SEED), []
    for start in range(0, count, BATCH):
        rows = slice(start, start + BATCH)
        ids = diffusion_data.tokens(pipe.tokenizer, texts[rows])
        noise = torch.randn(latents[rows].shape, generator=draw)
        noisy, v = diffusion_data.noised(latents[rows], noise, alphas[levels[rows]])
        text = pipe.text_encoder(input_ids=ids).last_hidden_state
        guess = pipe.unet(noisy, levels[rows], text).sample
        errors.append((guess - v).square().mean((1, 2, 3)))
    error = torch.cat(errors)
    fifths = levels * FIFTHS // end
    return [float(error[fifths == fifth].mean()) for fifth in range(FIFTHS)]

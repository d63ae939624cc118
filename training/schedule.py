"""The learning rate and the loss weight as plain formulas of the step and the timestep.

Numbers and tensors in, numbers and tensors out; no state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from training.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of optimiser step `step` (0-based, 0 <= step < recipe.steps).

    Warm-up: linear, `lr·(step+1)/warmup_steps`. Then, with p the share of the phase that is done:
    constant: `lr`. cosine: `lr·(1 + cos(π·p))/2` over all steps after the warm-up. wsd: `lr`, and
    over the last `decay_share` of all steps the cooldown `lr·(1 - √p)` of Hägele et al. 2024
    ("Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", eq. 2).
    """
    peak, schedule = recipe.optimizer.lr, recipe.schedule
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.type == "constant":
        return peak
    if schedule.type == "cosine":
        done = (step - schedule.warmup_steps) / (recipe.steps - schedule.warmup_steps)
        return peak * (1 + math.cos(math.pi * done)) / 2
    decay_steps = max(1, round(recipe.steps * schedule.decay_share))
    decay_start = max(schedule.warmup_steps, recipe.steps - decay_steps)
    if step < decay_start:
        return peak
    return peak * (1 - math.sqrt((step - decay_start) / (recipe.steps - decay_start)))


def min_snr_weights(
    alphas_cumprod: Tensor, timesteps: Tensor, prediction_type: str, gamma: float | None
) -> Tensor:
    """Loss weight of every sample (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR").

    With SNR = ᾱ/(1-ᾱ): noise prediction `min(SNR, γ)/SNR`, v prediction `min(SNR, γ)/(SNR+1)`;
    1 where `gamma` is None. At zero terminal SNR the first tends to 1 and the second to 0; both
    are finite here.  # (T,), (N,) -> (N,) fp32
    """
    if gamma is None:
        return torch.ones(timesteps.shape, device=timesteps.device)
    signal = alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]  # (N,)
    snr = signal / (1 - signal)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    # min(SNR, γ)/SNR as min(1, γ/SNR): γ/0 is infinite and its minimum with 1 is the limit.
    return (gamma / snr).clamp(max=1.0)


def sample_losses(
    prediction: Tensor,
    target: Tensor,
    huber_c: Sequence[float | None],
    cell_weights: Tensor | None = None,
) -> Tensor:
    """Mean over a sample of e², or of `2c(√(e² + c²) - c)` where it has a c; e is the error.

    The latter is diffusers' and sd-scripts' pseudo-Huber loss (Charbonnier et al. 1997). With
    `cell_weights` every latent cell's part is multiplied by its own before the mean, which is
    not divided by them (sd-scripts' masked loss).
    # 2 x (N, C, h, w), N, (N, 1, h, w) -> (N,)
    """
    squares = (prediction - target).square()
    huber = [number for number, c in enumerate(huber_c) if c is not None]
    if huber:
        c = torch.tensor([huber_c[number] for number in huber], device=squares.device)
        c = c.view(-1, 1, 1, 1)
        squares = squares.index_copy(
            0,
            torch.tensor(huber, device=squares.device),
            2 * c * ((squares[huber] + c**2).sqrt() - c),
        )
    if cell_weights is not None:
        squares = squares * cell_weights
    return squares.mean(dim=(1, 2, 3))


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """`√ᾱ·x + √(1-ᾱ)·ε` (Ho et al. 2020, eq. 4).  # (N, C, h, w)"""
    signal, sigma = _rates(alphas_cumprod, timesteps, latents)
    return signal * latents + sigma * noise


def training_target(
    latents: Tensor,
    noise: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    prediction_type: str,
) -> Tensor:
    """What the UNet should predict: ε, or v = √ᾱ·ε - √(1-ᾱ)·x (Salimans & Ho 2022, appendix D).

    # (N, C, h, w)
    """
    if prediction_type == "epsilon":
        return noise
    signal, sigma = _rates(alphas_cumprod, timesteps, latents)
    return signal * noise - sigma * latents


def _rates(alphas_cumprod: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alphas = alphas_cumprod.to(like.device, like.dtype)[timesteps].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()  # 2 x (N, 1, 1, 1)

"""What a base was trained to predict: noise or v of a diffusion, or the velocity of a flow.

Latents, noise and timesteps in; noisy latents, the target, loss weights and drawn timesteps out.
Pure: every draw comes from the generator that is handed over.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from training.recipe import Recipe
from training.schedule import add_noise, min_snr_weights, training_target

# Flow models are given the time as a share of this.
FLOW_TIMESTEPS = 1000

PredictionType = Literal["epsilon", "v_prediction", "flow"]


class Objective(ABC):
    """How noise is put on latents, and what the denoiser should predict for them."""

    prediction_type: PredictionType

    @abstractmethod
    def draw_timestep(
        self, recipe: Recipe, generator: torch.Generator, shape: torch.Size
    ) -> Tensor:
        """One sample's timestep, a scalar as `predict` takes it; `shape` is (C, h, w)."""

    @abstractmethod
    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The latents at their timesteps.  # (N, C, h, w), (N, C, h, w), (N,) -> (N, C, h, w)"""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict.  # (N, C, h, w)"""

    @abstractmethod
    def weights(self, recipe: Recipe, timesteps: Tensor) -> Tensor:
        """The loss weight of every sample, fp32.  # (N,) -> (N,)"""


@dataclass(frozen=True)
class Diffusion(Objective):
    """DDPM (Ho et al. 2020) over the timesteps 0..T-1, int64."""

    prediction_type: Literal["epsilon", "v_prediction"]
    alphas_cumprod: Tensor  # (T,)

    def draw_timestep(
        self, recipe: Recipe, generator: torch.Generator, shape: torch.Size
    ) -> Tensor:
        if recipe.timestep_shift is not None:
            raise ValueError("timestep_shift belongs to flows: fit the recipe to the family")
        count = len(self.alphas_cumprod)
        if recipe.timestep_sampling == "logit_normal":
            return (_logit_normal(generator) * count).long().clamp(max=count - 1)
        return torch.randint(count, (), generator=generator)

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return add_noise(latents, noise, self.alphas_cumprod, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return training_target(latents, noise, self.alphas_cumprod, timesteps, self.prediction_type)

    def weights(self, recipe: Recipe, timesteps: Tensor) -> Tensor:
        return min_snr_weights(
            self.alphas_cumprod, timesteps, self.prediction_type, recipe.min_snr_gamma
        )


@dataclass(frozen=True)
class FlowShift:
    """How a flow model's times are moved towards noise: s·σ/(1 + (s - 1)·σ) with the shift s.

    Esser et al. 2024, section 5.3.2. `fixed` is s itself; a model whose shift grows with the
    picture has none, and s is e^μ with μ linear in the number of latent tokens, as in
    `diffusers.pipelines.flux.calculate_shift`.
    """

    fixed: float | None
    patch: int = 2  # latent cells per token along one side
    tokens: tuple[int, int] = (256, 4096)
    mu: tuple[float, float] = (0.5, 1.15)

    def at(self, height: int, width: int) -> float:
        """The shift for latents of this size."""
        if self.fixed is not None:
            return self.fixed
        count = (height // self.patch) * (width // self.patch)
        slope = (self.mu[1] - self.mu[0]) / (self.tokens[1] - self.tokens[0])
        return math.exp(self.mu[0] + slope * (count - self.tokens[0]))


@dataclass(frozen=True)
class FlowMatching(Objective):
    """Rectified flow (Liu et al. 2022; Esser et al. 2024): x_σ = (1 - σ)·x + σ·ε, to predict ε - x.

    Timesteps are 1000·σ, fp32, with σ in 0..1.
    """

    shift: FlowShift
    prediction_type: Literal["flow"] = "flow"

    def draw_timestep(
        self, recipe: Recipe, generator: torch.Generator, shape: torch.Size
    ) -> Tensor:
        """Logit-normal(0, 1) unless the recipe says uniform (Esser et al. 2024, section 3.1)."""
        if recipe.timestep_sampling == "uniform":
            sigma = torch.rand((), generator=generator)
        else:
            sigma = _logit_normal(generator)
        shift = recipe.timestep_shift or self.shift.at(shape[-2], shape[-1])
        return FLOW_TIMESTEPS * (shift * sigma / (1 + (shift - 1) * sigma))

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigmas = _sigmas(timesteps, latents)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def weights(self, recipe: Recipe, timesteps: Tensor) -> Tensor:
        """Every weight is 1: times are drawn with that density (Esser et al. 2024, eq. 18)."""
        if recipe.min_snr_gamma is not None:
            raise ValueError("min_snr_gamma belongs to diffusions: fit the recipe to the family")
        return torch.ones(timesteps.shape, device=timesteps.device)


def _logit_normal(generator: torch.Generator) -> Tensor:
    return torch.sigmoid(torch.randn((), generator=generator))


def _sigmas(timesteps: Tensor, like: Tensor) -> Tensor:
    return (timesteps.to(like.device, like.dtype) / FLOW_TIMESTEPS).view(-1, 1, 1, 1)

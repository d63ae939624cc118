"""Random adapters, and how far an adapter changes what a base answers."""

from __future__ import annotations

import numpy as np
import torch

from training.families import Base
from training.pack.adapters import initial_adapter
from training.recipe import Recipe


def random_adapter(base: Base, recipe: Recipe, size: float = 0.2) -> dict[str, torch.Tensor]:
    """An adapter that changes the outputs, as random numbers; the base is left bare."""
    generator = torch.Generator().manual_seed(1)
    state = initial_adapter(base, recipe.network, seed=0)
    for name, tensor in state.items():
        noise = size * torch.randn(tensor.shape, generator=generator)
        state[name] = tensor * (1 + noise) if "magnitude" in name else tensor + noise
    return state


def assert_same_effect(
    found: torch.Tensor, wanted: torch.Tensor, plain: torch.Tensor, share: float
) -> None:
    effect = (wanted - plain).abs().max()
    assert effect > 0.01
    assert (found - wanted).abs().max() < share * effect


def as_comfyui_does(weight: np.ndarray, change: np.ndarray, dora_scale: np.ndarray) -> np.ndarray:
    """ComfyUI's `weight_decompose` at strength 1, as the change of the weight.

    It takes the other axis when the scale's first length is the weight's, so that must not be.
    """
    assert dora_scale.shape[0] != weight.shape[0]
    full = torch.from_numpy(weight + change)
    norm = full.transpose(0, 1).reshape(full.shape[1], -1).norm(dim=1, keepdim=True)
    ones = [1] * (full.ndim - 1)
    norm = norm.reshape(full.shape[1], *ones).transpose(0, 1) + torch.finfo(full.dtype).eps
    return (full * (torch.from_numpy(dora_scale) / norm)).numpy() - weight

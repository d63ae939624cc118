"""The types that a recipe is computed in, and that the frozen base is held in."""

from __future__ import annotations

import torch

from training.recipe import Recipe

AUTOCAST_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_precision(recipe: Recipe, device: torch.device, half: str) -> str:
    """fp32, bf16 or fp16; auto is the family's `half` on CUDA, and fp32 on a CPU, where half types
    are slower."""
    if recipe.precision != "auto":
        return recipe.precision
    return half if device.type == "cuda" else "fp32"


def base_dtype(recipe: Recipe, device: torch.device, half: str) -> torch.dtype:
    """The type that the frozen base is held in: half precision on CUDA where the recipe allows it.

    `half` is what the base's family means by `precision: auto`.
    """
    if device.type != "cuda":
        return torch.float32
    return AUTOCAST_DTYPES.get(resolve_precision(recipe, device, half), torch.float32)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """PyTorch's context in which a forward pass computes in `precision`."""
    dtype = AUTOCAST_DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)

"""Square patches of latents as tokens, and back, as FLUX.1 and Qwen-Image take them."""

from __future__ import annotations

from torch import Tensor


def to_tokens(latents: Tensor, patch: int) -> Tensor:
    """Patches as tokens, channels slowest.  # (N, C, h, w) -> (N, h/p * w/p, C*p*p)"""
    count, channels, height, width = latents.shape
    parts = latents.view(count, channels, height // patch, patch, width // patch, patch)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * patch**2)


def from_tokens(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of `to_tokens`.  # (N, C, h, w)"""
    count = len(tokens)
    parts = tokens.view(count, height // patch, width // patch, -1, patch, patch)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(count, -1, height, width)

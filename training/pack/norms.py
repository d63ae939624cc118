"""DoRA's weight norms from the factors, without ever building the full weight.

Weights, their squared norms and the factors of L layers of one shape and D adapters in, the norms
of V = W + B·A out; `up` is B with the scale alpha/rank in it. Pure, fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A norm is never zero unless a whole row of the weight is; this keeps such a row finite.
SMALLEST_SQUARE = torch.finfo(torch.float32).tiny


def output_norms(weights: Sequence[Tensor], squares: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Of every output row: ‖V‖² = ‖W‖² + rowsum((2·W·Aᵀ + B·(A·Aᵀ)) ∘ B).

    # L x (out, in), (L, out), (L, D, R, in), (L, D, out, R) -> (L, D, out)
    """
    adapters, rank = down.shape[1:3]
    # One product per layer for all adapters at once.
    crossed = torch.stack(
        [
            weight.float() @ factor.flatten(0, 1).T
            for weight, factor in zip(weights, down, strict=True)
        ]
    )  # (L, out, D*R)
    crossed = crossed.unflatten(-1, (adapters, rank)).transpose(1, 2)  # (L, D, out, R)
    gram = down @ down.mT  # (L, D, R, R)
    added = ((2 * crossed + up @ gram) * up).sum(-1)  # (L, D, out)
    return (squares[:, None] + added).clamp_min(SMALLEST_SQUARE).sqrt()


def input_norms(weights: Sequence[Tensor], squares: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Of every input column: ‖V‖² = ‖W‖² + colsum((2·Bᵀ·W + (Bᵀ·B)·A) ∘ A).

    # L x (out, in), (L, in), (L, D, R, in), (L, D, out, R) -> (L, D, in)
    """
    adapters, rank = down.shape[1:3]
    crossed = torch.stack(
        [
            factor.mT.flatten(0, 1) @ weight.float()
            for weight, factor in zip(weights, up, strict=True)
        ]
    )  # (L, D*R, in)
    crossed = crossed.unflatten(1, (adapters, rank))  # (L, D, R, in)
    gram = up.mT @ up  # (L, D, R, R)
    added = ((2 * crossed + gram @ down) * down).sum(-2)  # (L, D, in)
    return (squares[:, None] + added).clamp_min(SMALLEST_SQUARE).sqrt()

"""DoRA's weight norms from the factors, without ever building the full weight.

Weights, their squared norms and the factors of L layers of one shape and D adapters in, the norms
of V = W + B·A out; `up` is B with the scale alpha/rank in it. Kernels come flattened, as (out,
in·cells) and (R, in·cells): the columns of a channel are its cells. Pure, fp32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# A norm is never zero unless a whole row of the weight is; this keeps such a row finite.
SMALLEST_SQUARE = torch.finfo(torch.float32).tiny


def input_norms(weights: Iterable[Tensor], squares: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The norm of every input column or channel of V.

    ‖V‖² = ‖W‖² + colsum((2·Bᵀ·W + (Bᵀ·B)·A) ∘ A)

    # L x (out, in·cells), (L, in), (L, D, R, in·cells), (L, D, out, R) -> (L, D, in)
    """
    added = _column_changes(weights, up.mT.contiguous(), down)
    if added.shape[-1] != squares.shape[-1]:
        added = added.unflatten(-1, (squares.shape[-1], -1)).sum(-1)
    return _norms(squares, added)


def output_norms(weights: Iterable[Tensor], squares: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The norm of every output row of V, which is a column of Vᵀ = Wᵀ + Aᵀ·Bᵀ.

    # L x (out, in), (L, out), (L, D, R, in), (L, D, out, R) -> (L, D, out)
    """
    added = _column_changes((weight.T for weight in weights), down, up.mT.contiguous())
    return _norms(squares, added)


def _column_changes(weights: Iterable[Tensor], near: Tensor, far: Tensor) -> Tensor:
    """What nearᵀ·far adds to the squared norms of the columns of W.

    # L x (m, n), (L, D, R, m), (L, D, R, n) -> (L, D, n)
    """
    crossed = torch.empty(far.shape, device=far.device)  # contiguous, also where `far` is not
    for weight, factor, product in zip(
        weights, near.flatten(1, 2), crossed.flatten(1, 2), strict=True
    ):
        # One product per layer for all adapters at once.
        torch.mm(factor, weight.float(), out=product)  # (D*R, n)
    gram = near @ near.mT  # (L, D, R, R)
    crossed.flatten(0, 1).baddbmm_(gram.flatten(0, 1), far.flatten(0, 1), beta=2)
    return crossed.mul_(far).sum(-2)


def _norms(squares: Tensor, added: Tensor) -> Tensor:
    """# (L, n), (L, D, n) -> (L, D, n)"""
    return (squares[:, None] + added).clamp_min(SMALLEST_SQUARE).sqrt()

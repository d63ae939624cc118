"""An optimiser for convolutions: momentum made orthogonal (Muon, Jordan et al. 2024).

Each weight of two or more axes is seen as a matrix (outputs x the rest). Its step is the momentum
with all singular values pushed to about one, scaled to AdamW's usual size (Liu et al. 2025,
arXiv:2502.16982, eq. 4). Everything else gets AdamW. Worth it where matrices are small: the
autoencoder and the tagger learn from far fewer pictures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

import torch

MOMENTUM = 0.95
NEWTON_STEPS = 5
# Coefficients of the quintic iteration of the reference implementation.
A, B, C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, AdamW for `others`; `lr` is AdamW-sized for both."""

    def __init__(
        self, matrices: Iterable[torch.Tensor], others: Iterable[torch.Tensor], lr: float
    ) -> None:
        groups = [{"params": list(matrices), "muon": True}, {"params": list(others), "muon": False}]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            (self._orthogonal if group["muon"] else self._adam)(live, group["lr"])

    def _orthogonal(self, parameters: list[torch.Tensor], lr: float) -> None:
        by_shape = defaultdict(list)
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            by_shape[p.shape].append((p, p.grad.lerp(state["momentum"], MOMENTUM)))
        for shape, pairs in by_shape.items():
            steps = torch.stack([step.reshape(shape[0], -1) for _, step in pairs])
            scale = 0.2 * max(steps.shape[-2:]) ** 0.5
            for (p, _), step in zip(pairs, orthogonal(steps), strict=True):
                p.add_(step.view(shape), alpha=-lr * scale)

    def _adam(self, parameters: list[torch.Tensor], lr: float) -> None:
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["first"], state["second"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
            first, second = state["first"], state["second"]
            first.lerp_(p.grad, 0.1)
            second.lerp_(p.grad.square(), 0.01)
            first = first / (1 - 0.9 ** state["step"])
            second = second / (1 - 0.99 ** state["step"])
            p.add_(first / (second.sqrt() + 1e-8), alpha=-lr)


def for_convolutions(model: torch.nn.Module, lr: float, ends: Collection[torch.Tensor]) -> Muon:
    """Muon for `model`'s convolutions but those at its `ends`, AdamW for all the rest."""
    trained = [p for p in model.parameters() if p.requires_grad]
    apart = {id(p) for p in ends}
    matrices = [p for p in trained if p.ndim == 4 and id(p) not in apart]
    chosen = {id(p) for p in matrices}
    return Muon(matrices, [p for p in trained if id(p) not in chosen], lr)


def orthogonal(steps: torch.Tensor) -> torch.Tensor:
    """Matrices (N, rows, columns) with their singular values moved to about one."""
    wide = steps.shape[-1] >= steps.shape[-2]
    x = steps if wide else steps.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_STEPS):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x if wide else x.mT

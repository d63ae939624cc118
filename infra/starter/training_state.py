"""What every stage's training shares: atomic checkpoints, averaged weights, a learning-rate shape.

A stage killed at any moment goes on from its last checkpoint, at most two minutes back.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

SAVE_INTERVAL_S = 120.0


class Training:
    """A model with its optimiser, EMA weights and step, kept in one file."""

    def __init__(
        self,
        path: Path,
        model: torch.nn.Module,
        lr: float,
        ema_decay: float,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.path, self.model, self.lr, self.ema_decay = path, model, lr, ema_decay
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer or torch.optim.AdamW(
            self.parameters, lr, weight_decay=0.01, fused=True
        )
        self.ema = [p.detach().clone() for p in self.parameters]
        # The step at which the optimiser was new: not 0 for weights that come from elsewhere.
        self.first_step = 0
        self.step, self._saved = 0, time.monotonic()
        if path.exists():
            device = self.parameters[0].device
            state = torch.load(path, weights_only=True, map_location=device)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema, self.step = state["ema"], state["step"]
            self.first_step = state.get("first_step", 0)

    def update(self, loss: torch.Tensor, steps: int, decay_share: float = 0.3) -> None:
        """One optimiser step at the rate for this step of `steps`, then the EMA."""
        self.descend(loss, self.lr * lr_factor(self.step, steps, decay_share))

    def update_open_ended(self, loss: torch.Tensor, constant_steps: int) -> None:
        """The same for a training that may end at any step: see `open_ended_factor`."""
        since_new = self.step - self.first_step
        self.descend(loss, self.lr * open_ended_factor(self.step, since_new, constant_steps))

    def descend(self, loss: torch.Tensor, rate: float) -> None:
        """One optimiser step at the given rate, then the EMA."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        # A short memory at first, so that the average is not full of the random start.
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)
        if time.monotonic() - self._saved > SAVE_INTERVAL_S:
            self.save()

    def save(self) -> None:
        """Write everything, atomically."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
            "step": self.step,
            "first_step": self.first_step,
        }
        partial = self.path.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.path)
        self._saved = time.monotonic()

    def use_average(self) -> torch.nn.Module:
        """Put the averaged weights into the model (for use, not for training on)."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.ema, strict=True):
                parameter.copy_(average)
        return self.model


def lr_factor(step: int, steps: int, decay_share: float, warmup: int = 100) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last `decay_share`."""
    decay_start = steps * (1 - decay_share)
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_start:
        return 1.0
    return max(0.02, (steps - step) / (steps - decay_start))


def open_ended_factor(step: int, since_new: int, constant_steps: int, warmup: int = 100) -> float:
    """Linear warm-up of a new optimiser, then constant, then falling with the root of the step.

    This is the schedule of EDM2 (Karras et al. 2024, arXiv:2312.02696). It needs no end:
    averaged weights are good at any step, because the average does what a last decay would do.
    """
    return min(1.0, (since_new + 1) / warmup) * min(1.0, (constant_steps / max(step, 1)) ** 0.5)

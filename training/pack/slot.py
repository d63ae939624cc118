"""One trial's place in a pack: its row of the bank, and an optimiser and a loss scaler of its own.

What a checkpoint holds in; the same out, at any step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.adapters import adapter_state
from training.checkpoints import Contents
from training.latents import LatentCache
from training.pack.bank import UP, AdapterBank
from training.recipe import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Trial:
    """What is trained in a slot: a recipe on an encoded dataset, and where the results go."""

    trial_dir: Path
    recipe: Recipe
    cache: LatentCache

    @property
    def id(self) -> str:
        return self.trial_dir.name


class Slot:
    """Trains row `index` of the bank; nothing of it is shared with the other slots."""

    def __init__(
        self, bank: AdapterBank, index: int, trial: Trial, saved: Contents, scaled: bool
    ) -> None:
        """`scaled`: with a loss scaler, for fp16. The row holds the adapter of `saved` already."""
        self.index = index
        self.trial = trial
        self.recipe = trial.recipe
        self.step = saved.step  # optimiser steps done
        self.checkpoint_steps = frozenset(trial.recipe.checkpoint_steps())
        self._bank = bank
        row = nn.Parameter(bank.weights[index])  # shares the row's memory
        row.grad = bank.grads[index]
        options = trial.recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            [row],
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=True,
        )
        ones = bank.split(index, torch.ones_like(bank.weights[index]))
        ups = {key: part if key[1] == UP else torch.zeros_like(part) for key, part in ones.items()}
        self._faster = bank.join(index, ups).bool()  # (P,): B, whose learning rate is its own
        self.scaler = torch.amp.GradScaler(bank.device.type, enabled=scaled)
        self._restore(saved.state)

    def set_learning_rate(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr

    def take_step(self) -> None:
        """Change the weights by their gradients; an fp16 step that overflowed changes nothing."""
        row, ratio = self._bank.weights[self.index], self.recipe.optimizer.lora_plus_ratio
        before = row.clone() if ratio != 1 else row
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if ratio != 1:
            # AdamW's step, its decay included, is proportional to the learning rate.
            row[self._faster] = torch.lerp(before[self._faster], row[self._faster], ratio)

    def contents(self) -> Contents:
        """All that is needed to go on from here, in this pack or in another."""
        adapter = adapter_state(self._bank, self.index)
        return Contents(self.step, self.recipe, adapter, self.optimizer_state())

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments and the loss scaler as named tensors on the CPU.

        The names are those of PEFT's parameters. The schedule, the data order and all draws follow
        from the step and the seed, so there is nothing of them to save.
        """
        tensors: dict[str, Tensor] = {}
        for state in self.optimizer.state.values():
            for key in MOMENTS:
                for (module, part), moment in self._bank.split(self.index, state[key]).items():
                    name = _parameter_name(module, part)
                    tensors[f"optimizer/{name}/{key}"] = moment
                    tensors[f"optimizer/{name}/step"] = state["step"]
        if self.scaler.is_enabled():
            saved = self.scaler.state_dict()
            tensors["scaler/scale"] = torch.tensor(saved["scale"], dtype=torch.float64)
            tensors["scaler/growth_tracker"] = torch.tensor(saved["_growth_tracker"])
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        keys = list(self._bank.split(self.index, self._bank.weights[self.index]))
        names = {key: f"optimizer/{_parameter_name(*key)}" for key in keys}
        if f"{names[keys[0]]}/step" in tensors:  # it has none before its first step
            moments = {
                kind: self._bank.join(
                    self.index, {key: tensors[f"{name}/{kind}"] for key, name in names.items()}
                )
                for kind in MOMENTS
            }
            state = {0: {"step": tensors[f"{names[keys[0]]}/step"].clone(), **moments}}
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.scaler.is_enabled() and "scaler/scale" in tensors:
            saved = self.scaler.state_dict()
            saved["scale"] = float(tensors["scaler/scale"])
            saved["_growth_tracker"] = int(tensors["scaler/growth_tracker"])
            self.scaler.load_state_dict(saved)


def _parameter_name(module: str, part: str) -> str:
    return f"{module}.{part}.default.weight"

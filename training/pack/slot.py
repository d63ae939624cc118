"""One trial's place in a pack: its row of the bank, and an optimiser and a loss scaler of its own.

What a checkpoint holds in; the same out, at any step. The weights that are shown, scored and
exported may be an average of the trained ones. A checkpoint then has both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.checkpoints import Contents
from training.data.latents import LatentCache
from training.optimizer import ScheduleFree
from training.pack.adapters import adapter_state, state_name
from training.pack.bank import AdapterBank
from training.pack.keepers import Keeper
from training.pack.optimizer import RowOptimizer
from training.pack.parts import UP, is_of_encoder
from training.recipe import Recipe

# The prefix of the trained weights in a checkpoint's state, if its adapter is an average of them.
TRAINED = "trained/"


@dataclass(frozen=True)
class Trial:
    """What is trained in a slot: a recipe on an encoded dataset, and where the results go."""

    trial_dir: Path
    recipe: Recipe
    cache: LatentCache
    class_cache: LatentCache | None = None  # of the recipe's class pictures, if it names any

    def __post_init__(self) -> None:
        if (self.class_cache is None) != (self.recipe.class_pictures is None):
            raise ValueError(
                f"trial {self.id}: class pictures must be named and encoded, or neither"
            )

    @property
    def id(self) -> str:
        return self.trial_dir.name


class Slot:
    """Trains row `index` of the bank; nothing of it is shared with the other slots."""

    def __init__(
        self,
        bank: AdapterBank,
        index: int,
        trial: Trial,
        saved: Contents,
        scaled: bool,
        keeper: Keeper | None = None,
    ) -> None:
        """The row holds the adapter of `saved` already. `scaled` adds a loss scaler, for fp16.

        `keeper` alone has the optimiser and the average of the weights; with None every worker has
        them. Raises UserError if the recipe's optimiser is not installed.
        """
        self.index = index
        self.trial = trial
        self.recipe = trial.recipe
        self.step = saved.step  # optimiser steps done
        self.checkpoint_steps = frozenset(trial.recipe.checkpoint_steps())
        self.keeper = keeper
        self._bank = bank
        self._stepper = RowOptimizer(bank, index, trial.recipe.optimizer)
        self.optimizer = self._stepper.torch
        self._ratios = _learning_rate_ratios(bank, index, trial.recipe) if self.is_kept_here else {}
        self.scaler = torch.amp.GradScaler(bank.device.type, enabled=scaled)
        self._ema = (
            _moving_average(bank.weights[index], trial.recipe, saved.step)
            if self.is_kept_here
            else None
        )
        self._restore(saved.state)

    @property
    def is_kept_here(self) -> bool:
        """Whether this worker has the optimiser's state and takes the steps."""
        return self.keeper is None or self.keeper.is_here

    def set_learning_rate(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr

    def take_step(self) -> None:
        """Change the weights by their gradients; an fp16 step that overflowed changes nothing.

        Where another worker keeps the optimiser, `share_step` brings the weights.
        """
        if self.is_kept_here:
            self._step(self._bank.weights[self.index])
        self.scaler.update()

    def share_step(self) -> None:
        """With a keeper, give all workers its weights; to be called by all of them together."""
        if self.keeper is not None:
            self.keeper.spread(self._bank.weights[self.index])

    def _step(self, row: Tensor) -> None:
        before = row.clone() if self._ratios else row
        self.scaler.step(self.optimizer)
        self._stepper.stepped()
        for ratio, own in self._ratios.items():
            # These optimisers' steps, decay included, are proportional to the learning rate.
            row[own] = torch.lerp(before[own], row[own], ratio)
        if self._ema is not None:
            self._ema.step([nn.Parameter(row)])

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block every sample sees this slot's adapter as its checkpoint has it.

        The adapter has all of its ranks, whichever nested rank the last step had. With a keeper,
        all workers must enter the block together.
        """
        shown, row = self._shown(), self._bank.weights[self.index]
        if self.keeper is not None and self._averages:
            self.keeper.group.wait_for_all()  # rank 0 may still be writing the checkpoint
            shown = row.clone() if shown is None else shown.clone()
            self.keeper.spread(shown)
        if shown is None:
            with self._bank.only([self.index]), self._bank.at_rank(self.index, None):
                yield
            return
        trained = row.clone()
        row.copy_(shown)
        self._bank.changed()
        try:
            with self._bank.only([self.index]), self._bank.at_rank(self.index, None):
                yield
        finally:
            row.copy_(trained)
            self._bank.changed()

    @property
    def _averages(self) -> bool:
        """Whether the shown weights are an average of the trained ones."""
        options = self.recipe.optimizer
        return self.recipe.ema_decay is not None or isinstance(options, ScheduleFree)

    def _shown(self) -> Tensor | None:
        """The row that a checkpoint's adapter has, if it is not the trained one.  # (P,)"""
        if self._ema is not None:
            average: Tensor = self._ema.shadow_params[0]
            return average
        return self._stepper.averaged()

    def contents(self) -> Contents:
        """All that is needed to go on from here, in this pack or in another.

        For a slot that another worker keeps, this is all that this worker needs: the trained
        weights and the loss scaler.
        """
        adapter = adapter_state(self._bank, self.index, self._shown())
        return Contents(self.step, self.recipe, adapter, self.optimizer_state())

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's state and the loss scaler as named tensors on the CPU.

        Where the adapter is an average, the trained weights are there too, as `trained/…` and the
        adapter's names. The schedule, the data order and all draws follow from the step and the
        seed and need not be saved.
        """
        tensors = self._stepper.state()
        if self._shown() is not None:
            trained = adapter_state(self._bank, self.index)
            tensors |= {f"{TRAINED}{name}": tensor for name, tensor in trained.items()}
        if self.scaler.is_enabled():
            saved = self.scaler.state_dict()
            tensors["scaler/scale"] = torch.tensor(saved["scale"], dtype=torch.float64)
            tensors["scaler/growth_tracker"] = torch.tensor(saved["_growth_tracker"])
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        if any(name.startswith(TRAINED) for name in tensors):
            own = self._bank.split(self.index, self._bank.weights[self.index])
            component = self._bank.component
            trained = {key: tensors[f"{TRAINED}{state_name(component, *key)}"] for key in own}
            self._bank.load(self.index, trained)
        if self.is_kept_here:
            self._stepper.restore(tensors)
        if self.scaler.is_enabled() and "scaler/scale" in tensors:
            saved = self.scaler.state_dict()
            saved["scale"] = float(tensors["scaler/scale"])
            saved["_growth_tracker"] = int(tensors["scaler/growth_tracker"])
            self.scaler.load_state_dict(saved)


def _learning_rate_ratios(bank: AdapterBank, index: int, recipe: Recipe) -> dict[float, Tensor]:
    """The weights with a learning rate of their own, by its ratio to the optimiser's.

    They are B's in LoRA+ and those of the text encoders.  # (P,) each, boolean
    """
    plus = getattr(recipe.optimizer, "lora_plus_ratio", 1.0)
    of_encoders = recipe.encoder_lr / recipe.optimizer.lr
    zeros = bank.split(index, torch.zeros_like(bank.weights[index]))
    ratios = {
        (name, part): (plus if part == UP else 1.0) * (of_encoders if is_of_encoder(name) else 1.0)
        for name, part in zeros
    }
    return {
        ratio: bank.join(
            index, {key: zero + (ratios[key] == ratio) for key, zero in zeros.items()}
        ).bool()
        for ratio in sorted(set(ratios.values()) - {1.0})
    }


def _moving_average(row: Tensor, recipe: Recipe, step: int) -> Any:
    """diffusers' moving average, after `step` steps, of a row that holds the average now.

    None if the recipe asks for no average.
    """
    if recipe.ema_decay is None:
        return None
    from diffusers.training_utils import EMAModel

    average = EMAModel([nn.Parameter(row)], decay=recipe.ema_decay)
    average.optimization_step = step
    return average

"""Smaller micro-batches for a pack that ran out of memory, with the same samples and draws.

A recipe in, the same recipe with fewer samples in a micro-batch and more micro-batches out, and
what a trial's folder keeps of that. The maths is not touched: samples and their random numbers are
counted by their place in the whole step, so the result is equal up to float rounding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from captioning import UserError, write_atomic
from training.events import MemorySplit
from training.pack.out_of_memory import free_cached
from training.pack.pack import Pack
from training.pack.slot import Slot
from training.recipe import Recipe
from training.trial_files import ACCUMULATION, BATCH_SIZE, EFFECTIVE_FILE


class OutOfMemory(UserError):
    """A pack does not fit, with smaller micro-batches either; raised on every worker alike."""


class MicroBatches:
    """How the samples of a step are split, in one run of a pack."""

    def __init__(self, recipe: Recipe, trial_dirs: Sequence[Path]) -> None:
        """Start as `recipe` says, or as small as any of the trials had to become before."""
        self._planned_size = recipe.batch_size
        sizes = [size for size in map(_kept_size, trial_dirs) if size]
        fitting = [size for size in sizes if recipe.batch_size % size == 0]
        #: The pack's recipe, with the `batch_size` and `accumulation` that are computed with.
        self.recipe = _with_batch_size(recipe, min(fitting, default=recipe.batch_size))
        self._is_smaller = False
        self._found = "it did in an earlier run of a trial of the pack"
        # The trials whose folders say already how they are split.
        kept = zip(map(_kept_size, trial_dirs), trial_dirs, strict=True)
        self._told = {folder.name for size, folder in kept if size == self.recipe.batch_size}

    def shrink(self, found: str, pack: Pack) -> None:
        """Halve the micro-batches, once, and make room; `found` is the error's first words.

        An odd size is divided by its smallest factor, so that every micro-batch has as many
        samples. Raises OutOfMemory the second time, and when they hold a single sample.
        """
        size = self.recipe.batch_size
        if self._is_smaller or size == 1:
            raise OutOfMemory(
                f"trials {', '.join(slot.trial.id for slot in pack.slots)}",
                f"memory ran out ({found}) at step {pack.slots[0].step + 1}, with "
                f"{len(pack.slots)} × {self.recipe.samples_per_pass} samples in a forward pass",
                "lower the resolution or the rank, or set gradient_checkpointing in settings.yaml",
            )
        factor = next(factor for factor in range(2, size + 1) if size % factor == 0)
        self.recipe = _with_batch_size(self.recipe, size // factor)
        self._is_smaller = True
        self._found = found
        self._told.clear()
        free_cached(pack.base.device)

    def untold(self, pack: Pack) -> list[Slot]:
        """The slots in smaller micro-batches than planned whose folders do not say so yet.

        They are the slots of a pack that ran out of memory, and of trials that joined it later. To
        be asked when a step has fitted; each slot is returned once.
        """
        if self.recipe.batch_size == self._planned_size:
            return []
        untold = [slot for slot in pack.slots if slot.trial.id not in self._told]
        self._told.update(slot.trial.id for slot in untold)
        return untold

    def keep(self, slots: Sequence[Slot]) -> MemorySplit:
        """Write into the trials' folders how they are trained from here on; returns the event."""
        split = self.recipe
        content = {
            BATCH_SIZE: split.batch_size,
            ACCUMULATION: split.accumulation,
            "found": self._found,
        }
        for slot in slots:
            data = json.dumps({**content, "after_step": slot.step}, indent=1) + "\n"
            write_atomic(slot.trial.trial_dir / EFFECTIVE_FILE, data.encode())
        return MemorySplit(
            trials=tuple(slot.trial.id for slot in slots),
            effective_batch_size=split.batch_size,
            effective_accumulation=split.accumulation,
            found=self._found,
        )


def _with_batch_size(recipe: Recipe, size: int) -> Recipe:
    parts = recipe.batch_size // size
    return recipe.model_copy(
        update={"batch_size": size, "accumulation": recipe.accumulation * parts}
    )


def _kept_size(trial_dir: Path) -> int | None:
    file = trial_dir / EFFECTIVE_FILE
    return int(json.loads(file.read_text("utf-8"))[BATCH_SIZE]) if file.exists() else None

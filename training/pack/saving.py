"""The checkpoints of a pack's trials at a step are written, then named, then looked at.

Slots in, checkpoint folders out. All are saved before the first is looked at, since drawing
pictures for one trial may take minutes. A worker that is killed meanwhile has lost no trial's steps
and goes on with all of them at the same step; only the same pack goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from training.checkpoint_files import checkpoint_dir
from training.checkpoints import Contents, Unpublished, publish, write_checkpoint
from training.pack.slot import Slot, Trial


def keep_checkpoints(
    slots: Sequence[Slot],
    rank: int,
    step_samples: int,
    look: Callable[[Trial, int, Path], None] | None,
    survivable: type[Exception],
    fail: Callable[[Slot, Exception], None],
) -> list[Slot]:
    """Save every slot as it is now, and look at each; returns the slots for which that failed.

    To be called on every rank; rank 0 writes. `look(trial, step, folder)` is called on every rank
    while the base acts with this trial's adapter alone. What is `survivable` is handed to `fail`
    and ends that trial alone; anything else is raised.
    """
    written: dict[Slot, Unpublished] = {}

    def write(slot: Slot) -> None:
        contents = _contents(slot, rank)
        if contents is not None:
            contents = replace(contents, step_samples=step_samples)
            written[slot] = write_checkpoint(slot.trial.trial_dir, contents)

    def name(slot: Slot) -> None:
        if slot in written:
            publish(written[slot])

    def show(slot: Slot) -> None:
        if look is not None:
            with slot.alone():
                look(slot.trial, slot.step, checkpoint_dir(slot.trial.trial_dir, slot.step))

    failed: list[Slot] = []
    for act in (write, name, show):
        for slot in slots:
            if slot in failed:
                continue
            try:
                act(slot)
            except survivable as error:
                failed.append(slot)
                fail(slot, error)
    return failed


def _contents(slot: Slot, rank: int) -> Contents | None:
    """What goes into a checkpoint, on rank 0, which writes it; None on the other ranks."""
    if slot.keeper is not None:
        return slot.keeper.to_rank_0(slot.contents)
    return slot.contents() if rank == 0 else None

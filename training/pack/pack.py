"""A pack: trials seated together on one frozen base, each at a step of its own.

Trials and what their checkpoints hold in, a bank on the base and a slot for each out. A pack is
never changed in place: when trials leave, the others are seated anew from what they hold, which is
the way a checkpoint is resumed, so a pack that went on equals one that was started again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from training.adapters import attach_pack, detach, initial_adapter
from training.buckets import BucketLimits
from training.checkpoints import Contents, last_with_state, load_checkpoint
from training.families import Base
from training.pack.bank import AdapterBank
from training.pack.slot import Slot, Trial
from training.recipe import Recipe


def shared_by_a_pack(recipe: Recipe) -> tuple[object, ...]:
    """What trials must have in common, besides the base, to be trained in one pack."""
    return (
        recipe.network.targets,
        recipe.network.text_encoder is not None,
        recipe.resolution,
        BucketLimits.of(recipe),
        recipe.precision,
        recipe.base_precision,
        recipe.batch_size,
        recipe.accumulation,
        recipe.prior_weight > 0,
        recipe.class_pictures is not None,
    )


#: A trial, and where it goes on.
Seat = tuple[Trial, Contents]


@dataclass(frozen=True)
class Pack:
    """The bank on the base and its slots, in the bank's order."""

    base: Base
    bank: AdapterBank
    slots: tuple[Slot, ...]
    scaled: bool

    def without(self, gone: Iterable[Slot], joining: Sequence[Seat] = ()) -> Pack | None:
        """The pack of the other slots and those that join; None, and a bare base, if nobody sits.

        The others go on from what they hold, number for number.
        """
        left = [slot for slot in self.slots if slot not in set(gone)]
        seats = [*((slot.trial, slot.contents()) for slot in left), *joining]
        detach(self.base)
        return seat(self.base, seats, self.scaled) if seats else None


def seat(base: Base, seats: Sequence[Seat], scaled: bool) -> Pack:
    """Put the trials on `base`, which has no adapter on it.

    Raises ValueError if they cannot share a pack, UserError for contents that do not fit `base`.
    """
    if len({shared_by_a_pack(trial.recipe) for trial, _ in seats}) != 1:
        raise ValueError("trials of a pack must agree on all that `shared_by_a_pack` names")
    bank = attach_pack(base, [(trial.recipe.network, saved.adapter) for trial, saved in seats])
    slots = [Slot(bank, k, trial, saved, scaled) for k, (trial, saved) in enumerate(seats)]
    return Pack(base, bank, tuple(slots), scaled)


def last_contents(base: Base, trial: Trial) -> Contents:
    """Where the trial goes on: its last whole checkpoint, else its first weights at step 0."""
    last = last_with_state(trial.trial_dir)
    if last is not None:
        return load_checkpoint(last.path)
    recipe = trial.recipe
    return Contents(0, recipe, initial_adapter(base, recipe.network, recipe.seed), {})

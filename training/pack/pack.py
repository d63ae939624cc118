"""A pack: trials that train together on one frozen base, each at a step of its own.

Trials and what their checkpoints hold in, a bank on the base and a slot for each out. A pack is
never changed in place: when trials leave, a new pack is formed of the others from what they hold.
That is the way a checkpoint is resumed, so a pack that went on equals one that was started again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from training.checkpoints import Contents, last_with_state, load_checkpoint
from training.data.buckets import BucketLimits
from training.families import Base
from training.group import Group
from training.pack.adapters import attach_pack, initial_adapter
from training.pack.bank import AdapterBank
from training.pack.keepers import Keeper, keepers_for
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


class TrialState(NamedTuple):
    """A trial, what it goes on from, and which worker keeps its optimiser if one does already."""

    trial: Trial
    contents: Contents
    keeper: Keeper | None = None


@dataclass(frozen=True)
class Pack:
    """The bank on the base and its slots, in the bank's order."""

    base: Base
    bank: AdapterBank
    slots: tuple[Slot, ...]

    def states_without(self, gone: Iterable[Slot]) -> list[TrialState]:
        """The states of the other slots as they are now, to go on from number for number."""
        left = [slot for slot in self.slots if slot not in set(gone)]
        return [TrialState(slot.trial, slot.contents(), slot.keeper) for slot in left]


def form_pack(
    base: Base, states: Sequence[TrialState], scaled: bool, group: Group | None = None
) -> Pack:
    """Put the trials on `base`, which has no adapter on it.

    `scaled` adds loss scalers, for fp16. The workers of `group` keep the optimisers of a part of
    the trials each; with None every worker has all of them. Raises ValueError if trials cannot
    share a pack, UserError for contents that do not fit `base`.
    """
    if len({shared_by_a_pack(one.trial.recipe) for one in states}) != 1:
        raise ValueError("trials of a pack must agree on all that `shared_by_a_pack` names")
    bank = attach_pack(base, [(one.trial.recipe.network, one.contents.adapter) for one in states])
    keepers: dict[int, Keeper] = {}
    if group is not None:
        keepers = {k: one.keeper for k, one in enumerate(states) if one.keeper is not None}
        new = [k for k in range(len(states)) if k not in keepers]
        recipes = [states[k].trial.recipe for k in new]
        chosen = keepers_for(recipes, group, list(keepers.values()))
        keepers.update(zip(new, chosen, strict=True))
    slots = [
        Slot(bank, k, one.trial, one.contents, scaled, keepers.get(k))
        for k, one in enumerate(states)
    ]
    return Pack(base, bank, tuple(slots))


def last_contents(base: Base, trial: Trial) -> Contents:
    """Where the trial goes on: its last whole checkpoint, else its first weights at step 0."""
    last = last_with_state(trial.trial_dir)
    if last is not None:
        return load_checkpoint(last.path)
    recipe = trial.recipe
    return Contents(0, recipe, initial_adapter(base, recipe.network, recipe.seed), {})

"""Trials that wait for a slot in a pack; the first to come is the first to get one.

Trials in, the states from which they go on out, with their folders made ready.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from training.checkpoints import begun_with, last_with_state, remove_unfinished
from training.data.views import samples_per_step
from training.families import Base
from training.metrics_file import drop_rows_after
from training.pack.pack import TrialState, last_contents
from training.pack.slot import Trial
from training.recipe import Recipe


class WaitingTrials:
    """The trials that are not finished and have no slot yet."""

    def __init__(self, trials: Sequence[Trial], rank: int) -> None:
        """Only rank 0 touches the trials' folders."""
        #: The last step done of every trial, as its last whole checkpoint has it.
        self.done = {trial.id: _last_step(trial) for trial in trials}
        self._trials = deque(t for t in trials if self.done[t.id] < t.recipe.steps)
        self._rank = rank

    def __bool__(self) -> bool:
        return bool(self._trials)

    @property
    def shared(self) -> Recipe:
        """The next trial's recipe, for the settings in which all trials of a pack agree."""
        return self._trials[0].recipe

    def step_samples(self, workers: int) -> int:
        """The samples of a step: those that the trials began with, else those of so many workers.

        Raises ValueError for trials that differ in their number.
        """
        found = {
            begun_with(trial.trial_dir) or samples_per_step(trial.recipe, workers)
            for trial in self._trials
        }
        if len(found) != 1:
            raise ValueError(f"trials of a pack must agree on the samples per step, found {found}")
        return found.pop()

    def take_next(self, base: Base, count: int | None) -> list[TrialState]:
        """At most `count` trials (None: all) with what they go on from; they leave the queue."""
        left = len(self._trials)
        joining = [self._trials.popleft() for _ in range(left if count is None else count) if self]
        for trial in joining if self._rank == 0 else ():
            trial.trial_dir.mkdir(parents=True, exist_ok=True)
            remove_unfinished(trial.trial_dir)
            drop_rows_after(trial.trial_dir, self.done[trial.id])
        return [TrialState(trial, last_contents(base, trial)) for trial in joining]


def _last_step(trial: Trial) -> int:
    last = last_with_state(trial.trial_dir)
    return 0 if last is None else min(last.step, trial.recipe.steps)

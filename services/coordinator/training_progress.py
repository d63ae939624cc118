"""Turns the events of a sweep's training into progress: steps done, the loss, the memory at last.

Events in, calls of a `Step` out. What an event says in a sentence is left to who listens to events.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from services.farm.progress import Progress, Step
from services.sweeps.plan import SweepPlan
from training import (
    BaseScoring,
    Buckets,
    CheckpointSaved,
    CheckpointScored,
    CompiledChecked,
    Encoding,
    Event,
    MemorySplit,
    PackMeasured,
    StepTaken,
    Stopping,
    TrialFailed,
    TrialStarted,
    TrialStopped,
    TrialSucceeded,
    Waiting,
)

MB = 1e6


class TrainingProgress:
    """Called with every event of a sweep, in order."""

    def __init__(self, plan: SweepPlan, done: Mapping[str, int], step: Step) -> None:
        """`done` holds the steps of each trial that an earlier run left."""
        self._titles = {planned.trial: planned.title for planned in plan.trials}
        # Cuts of nested ranks take no steps of their own.
        self._done = {planned.trial: done.get(planned.trial, 0) for planned in plan.trained}
        self._total = sum(planned.recipe.steps for planned in plan.trained)
        self._step = step
        self._device_bytes = self._resident_bytes = 0  # the largest of all steps
        self.scoring_seconds: list[float] = []  # one for every checkpoint that was scored
        self._advance()  # steps of an earlier run do not count towards the speed

    def __call__(self, event: Event) -> None:
        match event:
            case Encoding():
                self._step.note(f"encoding pictures {event.done}/{event.total}")
            case BaseScoring():
                if event.state == "running":
                    self._step.note("the bare base is being scored")
            case StepTaken():
                speed = f"{event.pack_images_per_s:.3g} images/s"
                self._step.note(f"{self._titles[event.trial]} loss {event.loss:.3f}, {speed}")
                self._device_bytes = max(self._device_bytes, event.peak_device_bytes or 0)
                self._resident_bytes = max(self._resident_bytes, event.resident_bytes or 0)
                self._advance(event.trial, event.step)
            case CheckpointScored():
                self.scoring_seconds.append(event.seconds)
            case TrialStarted() | TrialSucceeded():
                self._advance(event.trial, event.step)
            case (
                Waiting()
                | Buckets()
                | PackMeasured()
                | CompiledChecked()
                | MemorySplit()
                | CheckpointSaved()
                | TrialFailed()
                | TrialStopped()
                | Stopping()
            ):
                pass  # these are no progress
            case _:
                assert_never(event)

    def tell_memory(self, progress: Progress) -> None:
        """Say, when all is trained, how much memory the steps took at most."""
        if self._device_bytes:
            size = f"{self._device_bytes / MB:.0f} MB of tensors"
            progress.say(f"peak memory of a step: {size} on the first worker's GPU")
        if self._resident_bytes:
            size = f"{self._resident_bytes / MB:.0f} MB resident"
            progress.say(f"largest memory after a step: {size} in the first worker")

    def _advance(self, trial: str | None = None, step: int = 0) -> None:
        if trial in self._done:
            self._done[trial] = step
        self._step.advance_to(sum(self._done.values()), self._total)

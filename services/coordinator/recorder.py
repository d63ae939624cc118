"""Brings the MLflow runs of a sweep up to what its trials' folders hold.

Events of the training in, rows in MLflow out: at every score, and once more at the end. Decides
nothing, and does nothing twice: what MLflow holds already is left alone.
"""

from __future__ import annotations

from typing import assert_never

from services.farm.progress import Step
from services.farm.settings import Home
from services.farm.states import State
from services.registry.registry import Registry
from services.registry.trial_facts import DatasetReference, TrialFacts
from services.report.trial_sheet import trial_sheet
from services.sweeps.files import failures
from services.sweeps.plan import PlannedTrial
from services.sweeps.prepare import PreparedSweep
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
    read_effective_batch,
    read_score,
    step_folders,
)


class Recorder:
    """The sweep's run in MLflow and, below it, those of its trials."""

    def __init__(self, home: Home, prepared: PreparedSweep, registry: Registry) -> None:
        """Open the sweep's run, or find it again."""
        asked = prepared.asked
        tags = {"base_hash": asked.base_hash, "family": asked.family, "dataset": asked.dataset}
        self._home, self._prepared, self._registry = home, prepared, registry
        self._trials = {planned.trial: planned for planned in prepared.plan.trials}
        self._sweep_run = registry.runs.open_sweep(asked.character, asked.sweep, tags)
        self._running: dict[str, str] = {}  # the MLflow run of every trial that is not ended yet

    def __call__(self, event: Event) -> None:
        """Record the trial that the event is about, if it has something new to record."""
        match event:
            case CheckpointScored():
                run_id = self._record(self._trials[event.trial], "running")
                self._running[event.trial] = run_id
            case TrialSucceeded():
                self._record(self._trials[event.trial], "succeeded")
                self._running.pop(event.trial, None)
            case TrialFailed():
                self._record(self._trials[event.trial], "failed")
                self._running.pop(event.trial, None)
            case (
                Waiting()
                | Encoding()
                | Buckets()
                | BaseScoring()
                | TrialStarted()
                | StepTaken()
                | PackMeasured()
                | CompiledChecked()
                | MemorySplit()
                | CheckpointSaved()
                | TrialStopped()
                | Stopping()
            ):
                pass  # nothing that a run shows has changed; `end` tells of a stop
            case _:
                assert_never(event)

    def finish(self, step: Step) -> dict[str, str]:
        """Record every trial for good, with its contact sheet; gives the run id of each trial."""
        asked, dataset = self._prepared.asked, self._prepared.dataset
        trials = self._prepared.plan.trials
        lost = failures(self._home.store, trials)
        run_ids = {}
        for done, planned in enumerate(trials, start=1):
            state: State = "failed" if (planned.cut_of or planned.trial) in lost else "succeeded"
            run_ids[planned.trial] = self._record(planned, state)
            sheet = trial_sheet(
                self._home.store, asked, dataset, planned, self._home.settings.workers
            )
            if sheet is not None:
                self._registry.runs.log_picture(run_ids[planned.trial], "contact-sheet", sheet)
            step.advance_to(done, len(trials))
        self._running.clear()
        return run_ids

    def verifying(self) -> None:
        """The trials are done; the winner's files are being written and read again."""
        self._registry.runs.set_state(self._sweep_run, "verifying")

    def end(self, state: State) -> None:
        """Bring the sweep's run, and those of trials that are not ended, to their last state."""
        for run_id in (*self._running.values(), self._sweep_run):
            self._registry.runs.set_state(run_id, state)

    def _record(self, planned: PlannedTrial, state: State) -> str:
        """Bring one trial's run up to its folder and return the run id."""
        asked, dataset = self._prepared.asked, self._prepared.dataset
        trial_dir = self._home.store.runs / planned.trial
        scores = {step: read_score(folder) for step, folder in step_folders(trial_dir).items()}
        return self._registry.runs.record_trial(
            self._sweep_run,
            TrialFacts(
                trial=planned.trial,
                recipe=planned.recipe.model_dump(mode="json"),
                dataset=DatasetReference(
                    dataset.character,
                    dataset.name,
                    dataset.path / "manifest.json",
                    dataset.manifest_sha256,
                ),
                trial_dir=trial_dir,
                scores={step: score.measures() for step, score in scores.items() if score},
                state=state,
                # Tags and not params: a later run may come down to smaller ones.
                tags={
                    "base_hash": asked.base_hash,
                    "family": asked.family,
                    **read_effective_batch(trial_dir),
                    **({"cut_of": planned.cut_of} if planned.cut_of else {}),
                },
            ),
        )

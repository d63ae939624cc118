"""Which events of a sweep bring its runs in MLflow up to date."""

import json
from pathlib import Path

import pytest
from score_examples import score

from captioning import DatasetVersion
from services.coordinator.recorder import Recorder
from services.farm.progress import Unwatched
from services.farm.settings import Home, Settings
from services.farm.states import State
from services.registry.mlflow_runs import STATE_TAG, TRIAL_TAG
from services.registry.registry import Registry
from services.sweeps.plan import SweepConfig
from services.sweeps.prepare import PreparedSweep, prepare_sweep
from training import (
    FAILED_FILE,
    CheckpointScored,
    StepTaken,
    TrialFailed,
    TrialStarted,
    TrialSucceeded,
)


@pytest.fixture
def home(home_path: Path) -> Home:
    return Home(home_path, Settings(cpus_per_worker=1, use_gpu=False))


@pytest.fixture
def prepared(home: Home, dataset: DatasetVersion) -> PreparedSweep:
    """A sweep of two trials, of which nothing was trained."""
    config = SweepConfig.model_validate({"search": {"network.rank": [4, 8]}})
    return prepare_sweep(home, dataset, config, "test")


@pytest.fixture
def registry(home: Home) -> Registry:
    return Registry(home.tracking_uri, home.artifacts)


def recorded(home: Home) -> dict[str, tuple[str, str]]:
    """The state and MLflow's status of every trial that has a run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(home.tracking_uri)
    experiment = client.get_experiment_by_name("aya")
    runs = client.search_runs([experiment.experiment_id])
    return {
        run.data.tags[TRIAL_TAG]: (run.data.tags[STATE_TAG], run.info.status)
        for run in runs
        if TRIAL_TAG in run.data.tags
    }


def test_scores_and_ends_are_recorded_and_steps_are_not(
    home: Home, prepared: PreparedSweep, registry: Registry
):
    first, second = (planned.trial for planned in prepared.plan.trials)
    recorder = Recorder(home, prepared, registry)
    recorder(TrialStarted(first, 0, 10))
    recorder(StepTaken(first, 1, 10, 0.1, 1e-4, 1.0, 10.0, 2, 1.0, 2.0))
    assert recorded(home) == {}
    recorder(CheckpointScored(first, 5, score(0.5), 2.0))
    assert recorded(home) == {first: ("running", "RUNNING")}
    recorder(TrialSucceeded(first, 10))
    recorder(TrialFailed(second, "no space left"))
    assert recorded(home) == {first: ("succeeded", "FINISHED"), second: ("failed", "FAILED")}


def test_at_the_end_every_trial_has_its_run_and_the_failed_one_says_so(
    home: Home, prepared: PreparedSweep, registry: Registry
):
    first, second = (planned.trial for planned in prepared.plan.trials)
    failed = home.store.runs / second / FAILED_FILE
    failed.parent.mkdir(parents=True)
    failed.write_text(json.dumps({"trial": second, "error": "no space left"}))
    recorder = Recorder(home, prepared, registry)
    run_ids = recorder.finish(Unwatched())
    recorder.end("succeeded")
    assert set(run_ids) == {first, second}
    assert recorded(home) == {first: ("succeeded", "FINISHED"), second: ("failed", "FAILED")}


@pytest.mark.parametrize(("state", "status"), [("cancelled", "KILLED"), ("failed", "FAILED")])
def test_trials_that_were_running_end_with_the_sweep(
    home: Home, prepared: PreparedSweep, registry: Registry, state: State, status: str
):
    first, second = (planned.trial for planned in prepared.plan.trials)
    recorder = Recorder(home, prepared, registry)
    recorder(CheckpointScored(first, 5, score(0.5), 2.0))
    recorder(TrialSucceeded(first, 10))
    recorder(CheckpointScored(second, 5, score(0.5), 2.0))
    recorder.end(state)
    assert recorded(home) == {first: ("succeeded", "FINISHED"), second: (state, status)}
    Recorder(home, prepared, registry)(CheckpointScored(second, 10, score(0.6), 2.0))
    assert recorded(home)[second] == ("running", "RUNNING"), "the sweep goes on"


def test_a_sweep_that_has_succeeded_stays_so_when_it_is_asked_for_again_and_stopped(
    home: Home, prepared: PreparedSweep, registry: Registry
):
    from mlflow.tracking import MlflowClient

    Recorder(home, prepared, registry).end("succeeded")
    Recorder(home, prepared, registry).end("cancelled")
    client = MlflowClient(home.tracking_uri)
    experiment = client.get_experiment_by_name("aya")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.data.tags[STATE_TAG], run.info.status) == ("succeeded", "FINISHED")

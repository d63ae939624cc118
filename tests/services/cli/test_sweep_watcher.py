"""What the person sees of the workers' events."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from captioning import DatasetVersion, parse_config
from services.cli import progress
from services.cli.progress import Display
from services.cli.watching import Watcher, pack_line
from services.coordinator.recorder import Recorder
from services.coordinator.training_progress import TrainingProgress
from services.farm.settings import Home, Settings
from services.registry.mlflow_runs import STATE_TAG, TRIAL_TAG
from services.registry.registry import Registry
from services.sweeps.plan import SweepConfig, SweepPlan, plan_sweep
from services.sweeps.prepare import prepare_sweep
from training import (
    Buckets,
    CompiledChecked,
    Event,
    MemorySplit,
    PackMeasured,
    StepTaken,
    Stopping,
    TrialFailed,
    TrialStarted,
)

DATASET = DatasetVersion("v0001-00000000", Path(), "aya", "ayachar", "person", (), (), "0" * 64)


@pytest.fixture
def plan() -> SweepPlan:
    config = parse_config(SweepConfig, {"recipe": {"steps": 10}}, "test")
    return plan_sweep(config, DATASET, "b" * 64, "sd15", "test")


def watch(plan: SweepPlan, *events: Event) -> str:
    """What is written to a log while these events come in."""
    stream = io.StringIO()
    with Display(Console(file=stream, width=200)) as display, display.step("trained") as step:
        training, watcher = TrainingProgress(plan, {}, step), Watcher(plan, display)
        for event in events:
            training(event)
            watcher(event)
        training.tell_memory(display)
    return stream.getvalue()


def step_taken(plan: SweepPlan, step: int, **memory: int) -> StepTaken:
    return StepTaken(
        trial=plan.trials[0].trial,
        step=step,
        steps=10,
        loss=0.125,
        lr=1e-4,
        grad_norm=1.0,
        step_ms=100.0,
        pack=1,
        images_per_s=12.34,
        pack_images_per_s=12.34,
        **memory,
    )


def test_a_pack_is_told_with_its_memory(plan: SweepPlan):
    sizes = (1_200_000, 1_200_000)
    written = watch(plan, PackMeasured(("t0", "t1"), sizes, 46_000_000, 0))
    assert "pack of 2: 1.2 MB each on a base of 46 MB" in written
    uneven = PackMeasured(("t0", "t1"), (2_000_000, 1_200_000), 46_000_000, 0)
    assert pack_line(uneven).startswith("pack of 2: 1.2 to 2.0 MB each")
    trained = PackMeasured(("t0", "t1"), sizes, 46_000_000, 7_000_000)
    assert pack_line(trained).endswith("on a base of 46 MB and text encoders of 7 MB")


def test_the_largest_memory_of_all_steps_is_told_once(plan: SweepPlan):
    sizes = (1_700_000_000, 2_048_000_000, 1_900_000_000)
    for name, words in (
        ("peak_device_bytes", "peak memory of a step: 2048 MB of tensors on the"),
        ("resident_bytes", "largest memory after a step: 2048 MB resident in the"),
    ):
        steps = [step_taken(plan, n, **{name: size}) for n, size in enumerate(sizes, start=1)]
        written = watch(plan, *steps)
        assert written.count(words) == written.count("memory") == 1
    assert "memory" not in watch(plan, step_taken(plan, 1))


def test_the_buckets_are_told_with_their_pictures(plan: SweepPlan):
    written = watch(plan, Buckets(((832, 1216, 3), (1024, 1024, 12))))
    assert "(width × height): 1216 × 832: 3, 1024 × 1024: 12" in written


def test_the_progress_line_tells_loss_and_pictures_per_second(
    plan: SweepPlan, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    written = watch(plan, step_taken(plan, 1), step_taken(plan, 2))
    assert "2/10" in written
    assert "loss 0.125, 12.3 images/s" in written


def test_who_goes_on_and_that_ctrl_c_was_heard_are_told(plan: SweepPlan):
    trial = plan.trials[0].trial
    written = watch(plan, TrialStarted(trial, 5, 10), Stopping())
    assert "goes on from step 5" in written and "stopping" in written
    for step in (0, 10):
        assert "goes on" not in watch(plan, TrialStarted(trial, step, 10))


def test_a_failure_is_told_and_recorded(home_path: Path, dataset: DatasetVersion):
    home = Home(home_path, Settings(cpus_per_worker=1, use_gpu=False))
    prepared = prepare_sweep(home, dataset, SweepConfig(), "test")
    (planned,) = prepared.plan.trials
    registry = Registry(home.tracking_uri, home.artifacts)
    recorder = Recorder(home, prepared, registry)
    failed = TrialFailed(planned.trial, "no space left")
    assert "no space left" in watch(prepared.plan, step_taken(prepared.plan, 1), failed)
    recorder(step_taken(prepared.plan, 1))
    assert trial_runs(home) == []
    recorder(failed)
    assert trial_runs(home) == [(planned.trial, "failed")]


def trial_runs(home: Home) -> list[tuple[str, str]]:
    """The trials that have a run in MLflow, with their states."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(home.tracking_uri)
    experiment = client.get_experiment_by_name("aya")
    tags = [run.data.tags for run in client.search_runs([experiment.experiment_id])]
    return [(one[TRIAL_TAG], one[STATE_TAG]) for one in tags if TRIAL_TAG in one]


def test_a_lack_of_memory_is_told(plan: SweepPlan):
    written = watch(plan, MemorySplit(("t0", "t1", "t2"), 2, 4, "no room"))
    assert "pack of 3 goes on with batches of 2, 4 in each step" in written


def test_what_tells_trials_apart_is_said_and_text_with_brackets_stays_whole():
    recipe = {"class_pictures": "people", "prior_weight": 0.5}
    search = {"class_prompt": ["a [red] person", "a person"]}
    config = parse_config(SweepConfig, {"search": search, "recipe": recipe}, "test")
    plan = plan_sweep(config, DATASET, "b" * 64, "sd15", "test")
    written = watch(plan, TrialFailed(plan.trials[0].trial, "[/] in the way"))
    assert "lora r16 (class_prompt a [red] person) failed: [/] in the way" in written


def test_compiled_blocks_are_told_to_agree_or_not(plan: SweepPlan):
    agreeing = watch(plan, CompiledChecked(2.5e-7, True, None))
    assert "compiled blocks checked: gradients differ by 2.5e-07" in agreeing
    written = watch(plan, CompiledChecked(0.04, False, None))
    assert "by 4.0e-02 of themselves); going on without them" in written
    broken = CompiledChecked(None, False, "InductorError: no [room]")
    assert "going on without: InductorError: no [room]" in watch(plan, broken)

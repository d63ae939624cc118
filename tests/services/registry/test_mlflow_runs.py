"""Sweeps and trials in MLflow: whole after any kill, never twice."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient
from PIL import Image

from captioning import UserError
from services.registry import mlflow_runs
from services.registry.bundle import file_sha256
from services.registry.mlflow_runs import STATE_TAG
from services.registry.registry import Registry
from services.registry.trial_facts import DatasetReference, TrialFacts, public_value
from training import MEASURES, Checkpoint, Interval, read_effective_batch, read_metrics
from training.checkpoints import drop_state

SCORES = {name: Interval(value=0.5, low=0.4, high=0.6) for name in MEASURES}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("template")
    Registry(f"sqlite:///{home / 'mlflow.db'}", home / "mlartifacts")
    return home / "mlflow.db"


@pytest.fixture
def open_registry(tmp_path: Path, empty_store: Path) -> Callable[[], Registry]:
    """Opens the registry of one home; each call is what a new process would do."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copyfile(empty_store, home / "mlflow.db")
    return lambda: Registry(f"sqlite:///{home / 'mlflow.db'}", home / "mlartifacts")


@pytest.fixture
def trial(tmp_path: Path) -> TrialFacts:
    """A finished trial of 6 steps with a scored checkpoint at 3 and at 6."""
    trial_dir = tmp_path / "runs" / "t0123456789ab"
    for step in (3, 6):
        folder = trial_dir / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "adapter.safetensors").write_bytes(bytes([step]) * 50)
        (folder / "state.safetensors").write_bytes(b"optimiser")
        (folder / "manifest.json").write_text("{}")
    write_rows(trial_dir, range(1, 7))
    manifest = tmp_path / "manifest.json"
    manifest.write_text('{"images": 6}')
    return TrialFacts(
        trial="t0123456789ab",
        recipe={"network": {"rank": 8, "alpha": None}, "steps": 6},
        dataset=DatasetReference("aya", "v0001-1a2b3c4d", manifest, "ab" * 32),
        trial_dir=trial_dir,
        scores={3: SCORES, 6: SCORES},
        state="succeeded",
        tags={"lorafarm.base": "/home/someone/models/starter", "lorafarm.family": "sd15"},
    )


def write_rows(trial_dir: Path, steps: range) -> None:
    rows = [
        {
            "kind": "step",
            "step": s,
            "steps": 6,
            "loss": 1 / s,
            "lr": 1e-4,
            "step_ms": 20.0,
            "images_per_s": 50.0 + s,
            "resident_bytes": 10**9,
        }
        for s in steps
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (trial_dir / "metrics.jsonl").write_text(text)


def everything(client: MlflowClient) -> dict[str, Any]:
    """All that MLflow holds about the character, without the ids that differ between homes."""
    experiment = client.get_experiment_by_name("aya")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    return {
        run.info.run_name: (
            run.info.status,
            run.data.params,
            {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"},
            {
                key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
                for key in run.data.metrics
            },
            artifacts(client, run.info.run_id),
            [entry.dataset.name for entry in run.inputs.dataset_inputs],
        )
        for run in runs
    } | {"runs": len(runs)}


def artifacts(client: MlflowClient, run_id: str, folder: str = "") -> list[str]:
    found = []
    for entry in client.list_artifacts(run_id, folder or None):
        found += artifacts(client, run_id, entry.path) if entry.is_dir else [entry.path]
    return sorted(found)


def client_of(registry: Registry) -> MlflowClient:
    return registry.runs._client


def record_all(registry: Registry, trial: TrialFacts) -> str:
    sweep = registry.runs.open_sweep("aya", "s1", {"lorafarm.base": "starter"})
    run_id = registry.runs.record_trial(sweep, trial)
    registry.runs.log_picture(run_id, "contact_sheet", Image.new("RGB", (4, 4), "teal"))
    registry.runs.set_state(sweep, "succeeded")
    return run_id


def test_run_shows_recipe_curves_scores_dataset_and_files(open_registry, trial) -> None:
    registry = open_registry()
    run_id = record_all(registry, trial)
    client = client_of(registry)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"network.rank": "8", "network.alpha": "None", "steps": "6"}
    losses = client.get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value) for m in losses] == [(s, 1 / s) for s in range(1, 7)]
    assert losses[-1].timestamp - losses[0].timestamp == 100  # five steps of 20 ms
    speed = client.get_metric_history(run_id, "train/images_per_s")
    assert [m.value for m in speed] == [50.0 + s for s in range(1, 7)]
    assert run.data.metrics["train/resident_bytes"] == 10**9
    scores = client.get_metric_history(run_id, "score/identity.low")
    assert [(m.step, m.value) for m in scores] == [(3, 0.4), (6, 0.4)]
    assert artifacts(client, run_id) == [
        "checkpoints/step-000003/adapter.safetensors",
        "checkpoints/step-000003/manifest.json",
        "checkpoints/step-000006/adapter.safetensors",
        "checkpoints/step-000006/manifest.json",
        "dataset/manifest.json",
        "pictures/contact_sheet.png",
    ]
    [entry] = run.inputs.dataset_inputs
    assert entry.dataset.name == "aya/v0001-1a2b3c4d"


def test_doing_it_all_twice_changes_nothing(open_registry, trial) -> None:
    run_id = record_all(open_registry(), trial)
    before = everything(client_of(open_registry()))
    assert record_all(open_registry(), trial) == run_id
    assert everything(client_of(open_registry())) == before
    assert before["runs"] == 2


class Killed(Exception):
    """Stands for SIGKILL between two calls to MLflow."""


class MortalClient:
    """The real client that dies after a number of calls; the last one still reached the store."""

    def __init__(self, client: MlflowClient, calls: int) -> None:
        self._client, self._left = client, calls

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = method(*args, **kwargs)
            self._left -= 1
            if self._left < 0:
                raise Killed
            return answer

        return call


@pytest.mark.slow
def test_killed_after_any_call_and_run_again_equals_an_unbroken_run(
    tmp_path: Path, empty_store: Path, trial
) -> None:
    def home(number: int) -> Registry:
        folder = tmp_path / f"home{number}"
        if not folder.exists():
            folder.mkdir()
            shutil.copyfile(empty_store, folder / "mlflow.db")
        return Registry(f"sqlite:///{folder / 'mlflow.db'}", folder / "mlartifacts")

    unbroken = home(0)
    record_all(unbroken, trial)
    expected = everything(client_of(unbroken))
    for calls in range(1000):
        registry = home(calls + 1)
        mortal = home(calls + 1)
        mortal.runs._client = MortalClient(client_of(registry), calls)  # type: ignore[assignment]
        try:
            record_all(mortal, trial)
        except Killed:
            record_all(registry, trial)
            assert everything(client_of(registry)) == expected, f"killed after call {calls}"
        else:
            break
    assert calls > 20, "the kill never happened between most calls"


def test_run_left_running_by_a_killed_process_is_found_and_finished(open_registry, trial) -> None:
    half = TrialFacts(**{**trial.__dict__, "state": "running", "scores": {3: SCORES}})
    write_rows(trial.trial_dir, range(1, 5))
    registry = open_registry()
    sweep = registry.runs.open_sweep("aya", "s1")
    left = registry.runs.record_trial(sweep, half)
    assert client_of(registry).get_run(left).info.status == "RUNNING"

    write_rows(trial.trial_dir, range(1, 7))
    again = open_registry()
    assert again.runs.record_trial(again.runs.open_sweep("aya", "s1"), trial) == left
    client = client_of(again)
    assert client.get_run(left).info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(left, "train/loss")]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_failed_trial_that_is_resumed_ends_finished(open_registry, trial) -> None:
    registry = open_registry()
    sweep = registry.runs.open_sweep("aya", "s1")
    failed = TrialFacts(**{**trial.__dict__, "state": "failed"})
    run_id = registry.runs.record_trial(sweep, failed)
    assert client_of(registry).get_run(run_id).info.status == "FAILED"
    registry.runs.record_trial(sweep, trial)
    assert client_of(registry).get_run(run_id).info.status == "FINISHED"


def test_changed_scores_file_is_sent_again(open_registry, trial) -> None:
    registry = open_registry()
    sweep = registry.runs.open_sweep("aya", "s1")
    scores = trial.trial_dir / "step-000006" / "scores.json"
    scores.write_text("old")
    run_id = registry.runs.record_trial(sweep, trial)
    scores.write_text("new")
    registry.runs.record_trial(sweep, trial)
    path = client_of(registry).download_artifacts(run_id, "checkpoints/step-000006/scores.json")
    assert Path(path).read_text() == "new"


def keep_hashes(trial_dir: Path) -> None:
    """Write manifests as training does, which name the hash of every file."""
    for folder in trial_dir.glob("step-*"):
        data = (folder / "adapter.safetensors").read_bytes()
        manifest = {
            "format": 1,
            "step": int(folder.name.removeprefix("step-")),
            "files": {"adapter.safetensors": hashlib.sha256(data).hexdigest()},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_recorded_is_not_read_again_and_a_score_is_sent_when_it_comes(
    open_registry, trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_hashes(trial.trial_dir)
    registry = open_registry()
    sweep = registry.runs.open_sweep("aya", "s1")
    running = replace(trial, state="running")
    run_id = registry.runs.record_trial(sweep, running)
    read: list[str] = []

    def hashed(file: Path) -> str:
        read.append(f"{file.parent.name}/{file.name}")
        return file_sha256(file)

    monkeypatch.setattr(mlflow_runs, "file_sha256", hashed)
    again = open_registry()
    again.runs.record_trial(sweep, running)
    assert not [name for name in read if name.endswith("adapter.safetensors")]
    read.clear()
    (trial.trial_dir / "step-000006" / "scores.json").write_text("scored")
    again.runs.record_trial(sweep, running)
    assert "step-000006/adapter.safetensors" in read
    assert "step-000003/adapter.safetensors" not in read
    path = client_of(again).download_artifacts(run_id, "checkpoints/step-000006/scores.json")
    assert Path(path).read_text() == "scored"


def drop_first_state(trial_dir: Path) -> None:
    """Drop the state of the first checkpoint, as training does after a later one."""
    folder = trial_dir / "step-000003"
    drop_state(Checkpoint(3, folder))
    assert not (folder / "state.safetensors").exists()


def test_a_checkpoint_whose_state_is_dropped_is_not_sent_again(open_registry, trial) -> None:
    keep_hashes(trial.trial_dir)
    registry = open_registry()
    sweep = registry.runs.open_sweep("aya", "s1")
    running = replace(trial, state="running")
    registry.runs.record_trial(sweep, running)
    drop_first_state(trial.trial_dir)
    counting = CountingClient(client_of(registry))
    registry.runs._client = counting
    registry.runs.record_trial(sweep, running)
    assert counting.calls["log_artifact"] == 0


def test_a_checkpoint_with_a_tag_of_an_earlier_version_is_not_sent_again(
    open_registry, trial
) -> None:
    keep_hashes(trial.trial_dir)
    registry = open_registry()
    sweep = registry.runs.open_sweep("aya", "s1")
    running = replace(trial, state="running")
    run_id = registry.runs.record_trial(sweep, running)
    client = client_of(registry)
    for folder in trial.trial_dir.glob("step-*"):
        digest = hashlib.sha256()
        for name in ("adapter.safetensors", "manifest.json"):
            digest.update(
                f"checkpoints/{folder.name}/{name}\0{file_sha256(folder / name)}\n".encode()
            )
        client.set_tag(run_id, f"{mlflow_runs.PUSHED_TAG}{folder.name}", digest.hexdigest())
    counting = CountingClient(client)
    registry.runs._client = counting
    registry.runs.record_trial(sweep, running)
    drop_first_state(trial.trial_dir)
    registry.runs.record_trial(sweep, running)
    assert counting.calls["log_artifact"] == 0


def test_a_damaged_checkpoint_is_not_recorded(
    open_registry, trial, caplog: pytest.LogCaptureFixture
) -> None:
    keep_hashes(trial.trial_dir)
    (trial.trial_dir / "step-000006" / "adapter.safetensors").write_bytes(b"damaged")
    registry = open_registry()
    run_id = record_all(registry, trial)
    kept = artifacts(client_of(registry), run_id)
    assert "checkpoints/step-000003/adapter.safetensors" in kept
    assert not [path for path in kept if "step-000006" in path]
    assert "step-000006" in caplog.text


def test_points_are_read_back_once_while_a_trial_runs(open_registry, trial) -> None:
    registry = open_registry()
    sweep = registry.runs.open_sweep("aya", "s1")
    running = replace(trial, state="running")
    write_rows(trial.trial_dir, range(1, 4))
    run_id = registry.runs.record_trial(sweep, running)
    counting = CountingClient(client_of(registry))
    registry.runs._client = counting
    write_rows(trial.trial_dir, range(1, 7))
    registry.runs.record_trial(sweep, running)
    assert counting.calls["get_metric_history"] == 0
    losses = client_of(open_registry()).get_metric_history(run_id, "train/loss")
    assert [m.step for m in losses] == [1, 2, 3, 4, 5, 6]


class CountingClient:
    """The real client, with a count of the calls by name."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self._client, name)


def test_a_run_without_a_state_is_read_and_given_one(open_registry, trial) -> None:
    """Runs were without the tag before there were states on them."""
    registry = open_registry()
    run_id = record_all(registry, trial)
    client = client_of(registry)
    client.delete_tag(run_id, STATE_TAG)
    assert record_all(open_registry(), trial) == run_id
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags[STATE_TAG]) == ("FINISHED", "succeeded")


def test_trials_of_two_characters_lie_in_two_experiments(open_registry) -> None:
    registry = open_registry()
    first = registry.runs.open_sweep("aya", "s1")
    second = registry.runs.open_sweep("ben", "s1")
    assert first != second


def test_deleted_experiment_is_explained(open_registry) -> None:
    registry = open_registry()
    registry.runs.open_sweep("aya", "s1")
    client = client_of(registry)
    experiment = client.get_experiment_by_name("aya")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(UserError, match="restore"):
        registry.runs.open_sweep("aya", "s1")


def test_no_folder_of_the_person_reaches_the_run(open_registry, trial, tmp_path: Path) -> None:
    registry = open_registry()
    run = client_of(registry).get_run(record_all(registry, trial))
    texts = [*run.data.params.values(), *run.data.tags.values()]
    assert not [text for text in texts if "/home/" in text or str(tmp_path) in text]
    assert run.data.tags["lorafarm.base"] == "starter"


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("/home/a/models/sd", "sd"),
        ("C:\\models\\sd", "sd"),
        ("stabilityai/sd-turbo", "stabilityai/sd-turbo"),
        ("/home/a/xl.safetensors", "xl.safetensors"),
        ("/home/a/xl.safetensors@/home/a/sdxl", "xl.safetensors@sdxl"),
        ("/home/a/xl.safetensors@owner/sdxl", "xl.safetensors@owner/sdxl"),
        ("0.0001", "0.0001"),
    ],
)
def test_public_value_keeps_hub_ids_and_cuts_paths(value: str, public: str) -> None:
    assert public_value(value) == public


def test_metric_rows_survive_a_torn_line_and_a_repeated_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0, "grad_norm": Infinity}\n'
        '{"step": 2, "loss": 1.5}\n{"step": 3, "lo'
    )
    rows = read_metrics(tmp_path)
    assert [(row.step, row.values) for row in rows] == [(1, {"loss": 3.0}), (2, {"loss": 1.5})]


def test_broken_metric_row_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_smaller_micro_batches_are_tags_of_the_run(open_registry, trial) -> None:
    content = {"effective_batch_size": 2, "effective_accumulation": 4, "found": "no room"}
    (trial.trial_dir / "effective_batch.json").write_text(json.dumps(content))
    registry = open_registry()
    tags = {**trial.tags, **read_effective_batch(trial.trial_dir)}
    run_id = record_all(registry, replace(trial, tags=tags))
    found = client_of(registry).get_run(run_id).data.tags
    assert (found["effective_batch_size"], found["effective_accumulation"]) == ("2", "4")
    assert read_effective_batch(trial.trial_dir / "nothing") == {}

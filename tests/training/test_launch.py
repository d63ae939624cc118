"""The worker group on a real Ray: equal curves on two workers, deaths survived, Ctrl-C kept."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from captioning import DatasetVersion, UserError
from training.checkpoints import list_checkpoints
from training.families import load_base
from training.latents import encode_dataset
from training.launch import run_trials
from training.loop import Event, train_pack
from training.pack.slot import Trial
from training.recipe import Recipe
from training.worker import SweepJob, TrialSpec

pytestmark = pytest.mark.slow


def recipe(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": {"rank": 4},
        "optimizer": {"lr": 1e-3},
        "steps": 6,
        "checkpoint_every": 2,
        "batch_size": 2,
        "seed": 9,
    }
    return Recipe.model_validate({**data, **changes})


def make_job(base: Path, dataset: DatasetVersion, folder: Path, *recipes: Recipe) -> SweepJob:
    return SweepJob(
        base=str(base),
        dataset_path=str(dataset.path),
        latents_dir=str(folder / "latents"),
        trials=tuple(
            TrialSpec(f"t{i}", recipe, folder / f"runs/t{i}") for i, recipe in enumerate(recipes)
        ),
        scoring=None,
        score_dir=str(folder / "base"),
    )


def losses(trial_dir: Path) -> list[float]:
    text = (trial_dir / "metrics.jsonl").read_text()
    return [json.loads(line)["loss"] for line in text.splitlines()]


def train_here(base: Path, dataset: DatasetVersion, folder: Path, *recipes: Recipe) -> list[Path]:
    """The same trials as one pack in this process with one thread, without Ray."""
    torch.set_num_threads(1)
    loaded = load_base(base)
    cache = encode_dataset(dataset, loaded, None, False, folder / "latents-here")
    trials = [Trial(folder / f"here/t{i}", recipe, cache) for i, recipe in enumerate(recipes)]

    def fail(trial: Trial, error: Exception) -> None:
        raise AssertionError(trial.id) from error

    train_pack(loaded, trials, on_failure=fail)
    return [trial.trial_dir for trial in trials]


def train_workers() -> list[psutil.Process]:
    """The Ray Train worker processes below this one; others on the machine are not ours to kill."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if title.startswith("ray::") and "RayTrainWorker" in title:
            found.append(process)
    return found


def test_two_workers_give_the_curve_of_one_with_the_doubled_batch(
    ray_local: None, tiny_base_path: Path, frozen_dataset: DatasetVersion, tmp_path: Path
) -> None:
    dora = {"rank": 2, "method": "dora"}
    recipes = [recipe(), recipe(seed=10, network=dora)]
    job = make_job(tiny_base_path, frozen_dataset, tmp_path, *recipes)
    # With half of the base each, in what Ray sets up of the environment: gradients are averaged as
    # by workers that have the whole.
    job = replace(job, strategy="deepspeed")
    events: list[Event] = []
    run_trials(job, events.append, workers=2, storage=tmp_path / "ray")
    doubled = [recipe(batch_size=4), recipe(batch_size=4, seed=10, network=dora)]
    here = train_here(tiny_base_path, frozen_dataset, tmp_path, *doubled)
    for spec, one in zip(job.trials, here, strict=True):
        two = spec.trial_dir
        assert losses(two) == pytest.approx(losses(one), rel=1e-5)
        steps = [e["step"] for e in events if e["kind"] == "step" and e["trial"] == spec.trial]
        assert steps == [1, 2, 3, 4, 5, 6]
        # One step moves a weight by up to lr = 1e-3; where a gradient is as small as Adam's eps,
        # the other order of summation shows as about 1e-5 of it (and so it does in one process).
        file = "step-000006/adapter.safetensors"
        found, expected = load_file(two / file), load_file(one / file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5)
    finished = [event for event in events if event["kind"] == "finished"]
    assert finished == [{"kind": "finished", "trial": t, "step": 6} for t in ("t0", "t1")]
    assert list((tmp_path / "ray").iterdir()) == []  # Ray's own files of the run are gone


def test_a_killed_worker_goes_on_and_ends_as_if_nothing_had_happened(
    ray_local: None, tiny_base_path: Path, frozen_dataset: DatasetVersion, tmp_path: Path
) -> None:
    # Long enough that the kill meets it in the middle.
    long = recipe(steps=100, checkpoint_every=20)
    job = make_job(tiny_base_path, frozen_dataset, tmp_path, long, recipe())
    killed: list[int] = []
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if event["kind"] == "step" and event["step"] >= 30 and not killed:
            for process in train_workers():
                killed.append(process.pid)
                os.kill(process.pid, signal.SIGKILL)

    run_trials(job, on_event, storage=tmp_path / "ray")
    assert len(killed) == 1
    starts = [e["step"] for e in events if e["kind"] == "trial" and e["trial"] == "t0"]
    assert len(starts) == 2
    assert starts[0] == 0
    assert 20 <= starts[1] < 100
    # The other one may have been finished before the kill, and is then told to be once more.
    assert {e["trial"] for e in events if e["kind"] == "finished"} == {"t0", "t1"}
    here, _ = train_here(tiny_base_path, frozen_dataset, tmp_path, long, recipe())
    there = job.trials[0].trial_dir
    assert losses(there) == losses(here)
    for name in ("adapter.safetensors", "state.safetensors"):
        file = f"step-000100/{name}"
        assert (there / file).read_bytes() == (here / file).read_bytes()


def test_ctrl_c_stops_the_workers(
    ray_local: None, tiny_base_path: Path, frozen_dataset: DatasetVersion, tmp_path: Path
) -> None:
    job = make_job(
        tiny_base_path, frozen_dataset, tmp_path, recipe(steps=5000, checkpoint_every=10)
    )

    def interrupt(event: Event) -> None:
        if event["kind"] == "checkpoint" and event["step"] >= 20:
            os.kill(os.getpid(), signal.SIGINT)  # as the terminal does

    with pytest.raises(KeyboardInterrupt):
        run_trials(job, interrupt, storage=tmp_path / "ray")
    assert train_workers() == []
    reached = list_checkpoints(job.trials[0].trial_dir)[-1].step
    assert 20 <= reached < 5000


def test_what_is_no_model_is_said_at_once(
    ray_local: None, frozen_dataset: DatasetVersion, tmp_path: Path
) -> None:
    job = make_job(tmp_path / "nothing", frozen_dataset, tmp_path, recipe())
    with pytest.raises(UserError, match="no such folder"):
        run_trials(job, lambda event: None, storage=tmp_path / "ray")


def test_without_ray_it_says_so(
    tmp_path: Path, frozen_dataset: DatasetVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests share one Ray
    with pytest.raises(UserError, match="Ray is not running"):
        run_trials(
            make_job(tmp_path, frozen_dataset, tmp_path, recipe()),
            lambda event: None,
            storage=tmp_path / "ray",
        )


def test_a_group_of_two_that_finds_room_for_one_trains_the_same_steps(
    ray_local: None, tiny_base_path: Path, frozen_dataset: DatasetVersion, tmp_path: Path
) -> None:
    """Ray has 2 CPUs here, and each worker asks for both."""
    job = make_job(tiny_base_path, frozen_dataset, tmp_path, recipe())
    events: list[Event] = []
    run_trials(
        job,
        events.append,
        workers=2,
        cpus_per_worker=2,
        min_workers=1,
        storage=tmp_path / "ray",
    )
    assert events[-1] == {"kind": "finished", "trial": "t0", "step": 6}
    (here,) = train_here(tiny_base_path, frozen_dataset, tmp_path, recipe(batch_size=4))
    assert losses(job.trials[0].trial_dir) == pytest.approx(losses(here), rel=1e-5)

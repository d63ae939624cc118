"""The worker group on a real Ray: equal curves on two workers, deaths survived, Ctrl-C kept."""

import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from run_rig import make_job, recipe, train_here
from safetensors.torch import load_file
from trained_trials import losses

from captioning import DatasetVersion, UserError
from training.checkpoints import list_checkpoints
from training.events import (
    CheckpointSaved,
    Event,
    StepTaken,
    Stopping,
    TrialStarted,
    TrialSucceeded,
)
from training.group import Group, Ledger
from training.run.job import SweepJob
from training.run.launch import run_trials
from training.run.mailbox import Post
from training.run.worker import Worker

pytestmark = pytest.mark.slow


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
        steps = [e.step for e in events if isinstance(e, StepTaken) and e.trial == spec.trial]
        assert steps == [1, 2, 3, 4, 5, 6]
        # One step moves a weight by up to lr = 1e-3; where a gradient is as small as Adam's eps,
        # the other order of summation shows as about 1e-5 of it (and so it does in one process).
        file = "step-000006/adapter.safetensors"
        found, expected = load_file(two / file), load_file(one / file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5)
    finished = [event for event in events if isinstance(event, TrialSucceeded)]
    assert finished == [TrialSucceeded(t, 6) for t in ("t0", "t1")]
    assert list((tmp_path / "ray").iterdir()) == []  # Ray's own files of the run are gone


def test_a_killed_worker_goes_on_and_ends_as_if_nothing_had_happened(
    ray_local: None, tiny_base_path: Path, frozen_dataset: DatasetVersion, tmp_path: Path
) -> None:
    # So long that the kill meets them at work, wherever it falls.
    long = {"steps": 100, "checkpoint_every": 20}
    dora = {"rank": 2, "method": "dora"}
    recipes = [recipe(**long), recipe(**long, seed=1, network=dora, ema_decay=0.9)]
    job = make_job(tiny_base_path, frozen_dataset, tmp_path, *recipes)
    at_step = random.SystemRandom().randint(1, 60)
    killed: list[int] = []
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepTaken) and event.step >= at_step and not killed:
            for process in train_workers():
                killed.append(process.pid)
                os.kill(process.pid, signal.SIGKILL)

    run_trials(job, on_event, storage=tmp_path / "ray")
    assert len(killed) == 1
    starts = [e.step for e in events if isinstance(e, TrialStarted) and e.trial == "t0"]
    assert len(starts) == 2, at_step
    assert starts[0] == 0
    assert at_step // 20 * 20 <= starts[1] < 100
    assert sorted(e.trial for e in events if isinstance(e, TrialSucceeded)) == ["t0", "t1"]
    unbroken = train_here(tiny_base_path, frozen_dataset, tmp_path, *recipes)
    for spec, here in zip(job.trials, unbroken, strict=True):
        assert losses(spec.trial_dir) == losses(here), at_step
        for name in ("adapter.safetensors", "state.safetensors"):
            file = f"step-000100/{name}"
            assert (spec.trial_dir / file).read_bytes() == (here / file).read_bytes(), at_step


def test_ctrl_c_stops_the_workers(
    ray_local: None, tiny_base_path: Path, frozen_dataset: DatasetVersion, tmp_path: Path
) -> None:
    job = make_job(
        tiny_base_path, frozen_dataset, tmp_path, recipe(steps=5000, checkpoint_every=10)
    )

    said: list[Event] = []

    def interrupt(event: Event) -> None:
        said.append(event)
        if isinstance(event, CheckpointSaved) and event.step >= 20:
            os.kill(os.getpid(), signal.SIGINT)  # as the terminal does

    with pytest.raises(KeyboardInterrupt):
        run_trials(job, interrupt, storage=tmp_path / "ray")
    assert train_workers() == []
    assert said[-1] == Stopping()
    reached = list_checkpoints(job.trials[0].trial_dir)[-1].step
    assert 20 <= reached < 5000


def test_what_keeps_all_trials_from_starting_is_said(
    ray_local: None,
    frozen_dataset: DatasetVersion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class HereTrainer:
        """Ray Train's, less the half minute in which it starts processes for the one worker."""

        def __init__(self, loop: Any, train_loop_config: dict[str, Any], **options: Any) -> None:
            orders = train_loop_config["orders"]
            self.worker = Worker(
                orders.job,
                Group(0, 1),
                torch.device("cpu"),
                Post(orders.mailbox),
                lambda: False,
                Ledger(Path(orders.ledger)),
                orders.max_deaths,
            )

        def fit(self) -> Any:
            return SimpleNamespace(return_value=self.worker.run())

    monkeypatch.setattr("ray.train.torch.TorchTrainer", HereTrainer)
    job = make_job(tmp_path / "nothing", frozen_dataset, tmp_path, recipe())
    with pytest.raises(UserError, match="no such folder"):
        run_trials(job, lambda event: None, storage=tmp_path / "ray")


@pytest.mark.parametrize(("options", "gpus"), [({"gpus_per_worker": 0.5}, 0.5), ({}, 1.0)])
def test_a_worker_books_its_share_of_a_gpu(
    ray_local: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, float],
    gpus: float,
) -> None:
    asked: dict[str, Any] = {}

    class NoTrainer:
        """Notes what it is asked for, since no GPU is here to be booked."""

        def __init__(self, loop: Any, **arguments: Any) -> None:
            asked.update(arguments)

        def fit(self) -> Any:
            return SimpleNamespace(return_value=None)

    monkeypatch.setattr("ray.train.torch.TorchTrainer", NoTrainer)
    job = SweepJob("base", "dataset", "latents", trials=(), scoring=None, score_dir="scores")
    storage = tmp_path / "ray"
    run_trials(job, lambda _: None, cpus_per_worker=3, use_gpu=True, storage=storage, **options)
    scaling = asked["scaling_config"]
    assert (scaling.num_workers, scaling.use_gpu) == (1, True)
    assert scaling.resources_per_worker == {"CPU": 3, "GPU": gpus}
    assert asked["torch_config"].backend == "nccl"


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

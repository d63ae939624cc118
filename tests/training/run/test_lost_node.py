"""A node of a Ray cluster is lost while a group trains on it: fewer workers take the same steps."""

import multiprocessing
import os
from pathlib import Path

import pytest
from run_rig import make_job, recipe, train_here
from trained_trials import losses

from captioning import DatasetVersion
from training.events import (
    Event,
    StepTaken,
    TrialStarted,
    TrialSucceeded,
    from_json_line,
    to_json_line,
)
from training.run.job import SweepJob
from training.run.launch import run_trials

pytestmark = pytest.mark.slow

STORE_BYTES = 100 * 1024 * 1024


def train_and_lose_a_node(job: SweepJob, folder: Path) -> None:
    """In a process of its own, since Ray is once in each: two nodes with a worker each."""
    os.environ |= {
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "500",  # Ray waits for a silent node for half a minute
        "RAY_health_check_initial_delay_ms": "500",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",  # for two, once more, before one is enough
    }
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    events: list[Event] = []
    there = [cluster.add_node(**node)]

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepTaken) and event.step == 15 and there:
            cluster.remove_node(there.pop(), allow_graceful=False)

    try:
        run_trials(job, on_event, workers=2, min_workers=1, storage=folder / "ray")
    finally:
        (folder / "events.json").write_text("\n".join(map(to_json_line, events)))
        ray.shutdown()
        cluster.shutdown()


def test_one_worker_goes_on_with_the_steps_of_two(
    tiny_base_path: Path, frozen_dataset: DatasetVersion, tmp_path: Path
) -> None:
    dora = {"rank": 2, "method": "dora"}
    long = {"steps": 60, "checkpoint_every": 10, "optimizer": {"lr": 1e-3, "eps": 1e-4}}
    recipes = [recipe(**long), recipe(**long, seed=1, network=dora)]
    job = make_job(tiny_base_path, frozen_dataset, tmp_path, *recipes)
    spawned = multiprocessing.get_context("spawn").Process(
        target=train_and_lose_a_node, args=(job, tmp_path)
    )
    spawned.start()
    doubled = [own.model_copy(update={"batch_size": 4}) for own in recipes]
    unbroken = train_here(tiny_base_path, frozen_dataset, tmp_path, *doubled)
    spawned.join(timeout=300)
    events = [from_json_line(line) for line in (tmp_path / "events.json").read_text().splitlines()]
    assert spawned.exitcode == 0
    starts = [e.step for e in events if isinstance(e, TrialStarted) and e.trial == "t0"]
    assert len(starts) == 2 and starts[0] == 0 and 10 <= starts[1] < 60
    assert sorted(e.trial for e in events if isinstance(e, TrialSucceeded)) == ["t0", "t1"]
    for spec, here in zip(job.trials, unbroken, strict=True):
        assert losses(spec.trial_dir) == pytest.approx(losses(here), rel=1e-5)

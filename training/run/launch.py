"""Runs the trials of a sweep on Ray Train: one worker group for all of them.

A `SweepJob` in; the trials' folders are filled and the caller sees every event. Never decides
which trials to run and never reads their results.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from captioning import UserError
from training.events import OnEvent, Stopping, Waiting
from training.families import absolute_base
from training.group import Group, Ledger
from training.run.job import SweepJob, TrialSpec
from training.run.mailbox import Mailbox, Post
from training.run.worker import SetupError, Worker
from training.trial_files import FAILED_FILE

# How long one exchange of gradients may take: a lost worker must not block the others for long, but
# a step on a busy machine may be slow. A dead process is noticed at once, by its closed connection.
PROCESS_GROUP_TIMEOUT_S = 120
# The same limit while one worker still compiles what another has found in its cache.
COMPILING_TIMEOUT_S = 3600
POLL_INTERVAL_S = 0.1
# After a stop request a worker ends at its next step; scoring a checkpoint may take this long.
STOP_TIMEOUT_S = 30.0
# A group that got no CPU or GPU for this long is said to wait, since Ray waits silently.
WAITING_NOTICE_S = 60.0
LEDGER_FILE = "deaths.json"
# Ray Train hands the workers a mapping; this is its one key.
ORDERS = "orders"


def run_trials(
    job: SweepJob,
    on_event: OnEvent,
    workers: int = 1,
    cpus_per_worker: int = 1,
    use_gpu: bool = False,
    *,
    storage: Path,
    max_failures: int = 2,
    min_workers: int | None = None,
    gpus_per_worker: float = 1.0,
) -> None:
    """Train and score all trials of `job`, pack by pack, and return when all are done.

    Ray must be running. `on_event` is called in this thread with the events that
    `training.events` describes, in the order in which the workers sent them.

    With `min_workers` the group starts, and starts again after a death, with as many workers as
    find a place then, from `min_workers` to `workers`. A step has the samples of `workers` even so.
    `gpus_per_worker` is what a worker books of a GPU in Ray's accounts, 0 to 1; nothing keeps it
    from using more.

    A worker that dies is started again, and goes on from the checkpoints, at most `max_failures`
    times per pack; then the pack is tried in halves, down to a single trial. That one is then
    marked failed, like one that raises: `failed.json` in its folder says why, and the others go
    on. A failed trial is tried again by the next call.
    KeyboardInterrupt, and whatever `on_event` raises, stops the workers and is raised again; all
    up to the last checkpoint is kept. Raises UserError when nothing can be started (no such base,
    a damaged dataset) or when the workers keep dying.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        raise UserError("training", "Ray is not running", "start it first: ray.init(), or the CLI")
    job = replace(_with_absolute_paths(job), batch_workers=workers)
    for spec in job.trials:
        (spec.trial_dir / FAILED_FILE).unlink(missing_ok=True)
    run_dir = storage.resolve() / f"train-{uuid.uuid4().hex[:12]}"  # Ray reads an old run's files
    run_dir.mkdir(parents=True)
    # The mailbox stays on this node, since another one may be lost while the workers go on.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
    size = _Size(workers, min_workers, cpus_per_worker, gpus_per_worker if use_gpu else 0)
    fit = _Fit(job, mailbox, run_dir, size, max_failures)
    fit.start()
    try:
        _forward_events(mailbox, fit, on_event, size)
    except BaseException as error:
        mailbox.stop.remote()
        if isinstance(error, KeyboardInterrupt):
            on_event(Stopping())
        fit.join(STOP_TIMEOUT_S)
        raise
    finally:
        ray.kill(mailbox)
        if not fit.is_alive():
            shutil.rmtree(run_dir)
    fit.raise_if_failed()


@dataclass(frozen=True)
class _Size:
    """The size of the worker group: how many workers it has, and what each of them books."""

    workers: int
    min_workers: int | None
    cpus_per_worker: int
    gpus_per_worker: float  # 0: training on the CPU

    @property
    def least_workers(self) -> int:
        return self.min_workers or self.workers

    @property
    def use_gpu(self) -> bool:
        return self.gpus_per_worker > 0


@dataclass(frozen=True)
class _Orders:
    """What every worker of the group is told when it starts."""

    job: SweepJob
    mailbox: Any  # the driver's actor, to which events go
    ledger: Path  # the file that counts the workers' deaths
    threads: int  # with which a worker computes
    max_deaths: int  # of a worker at one pack, before the pack is tried in halves


class _Fit(threading.Thread):
    """`TorchTrainer.fit()` beside the main thread, which stays free for events and Ctrl-C.

    In the main thread Ray would install its own SIGINT handler, which ends the process with
    exit status 0.
    """

    def __init__(
        self,
        job: SweepJob,
        mailbox: Any,
        run_dir: Path,
        size: _Size,
        max_failures: int,
    ) -> None:
        super().__init__(name="ray-train-fit", daemon=True)
        # They must be set before Ray Train is imported; a run of minutes needs neither.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        logging.getLogger("ray.train").setLevel(logging.ERROR)
        self._run_dir = run_dir
        self._outcome: SetupError | None = None
        self._error: Exception | None = None
        self._trainer = TorchTrainer(
            run_worker,
            train_loop_config={
                ORDERS: _Orders(
                    job=job,
                    mailbox=mailbox,
                    ledger=run_dir / LEDGER_FILE,
                    threads=size.cpus_per_worker,
                    max_deaths=max(1, max_failures),
                )
            },
            scaling_config=ScalingConfig(
                num_workers=(
                    (size.least_workers, size.workers) if size.min_workers else size.workers
                ),
                # A group that is at work is left alone, since Ray would end it to resize it.
                elastic_resize_monitor_interval_s=math.inf,
                use_gpu=size.use_gpu,
                resources_per_worker={"CPU": size.cpus_per_worker, "GPU": size.gpus_per_worker},
            ),
            run_config=RunConfig(
                name=run_dir.name,
                storage_path=str(run_dir.parent),
                # The ledger gives up the setup, a pack, and each of its halves down to a trial,
                # after max_failures deaths of each: n trials make 2n - 1 packs at most.
                failure_config=FailureConfig(max_failures=max_failures * 2 * len(job.trials)),
            ),
            torch_config=TorchConfig(
                backend="nccl" if size.use_gpu else "gloo",
                timeout_s=COMPILING_TIMEOUT_S if job.compile else PROCESS_GROUP_TIMEOUT_S,
            ),
        )

    def run(self) -> None:
        try:
            self._outcome = self._trainer.fit().return_value
        except Exception as error:
            self._error = error  # raised again in the caller's thread

    def raise_if_failed(self) -> None:
        """Raise what kept the trials from starting, or what killed the workers."""
        if self._error is not None:
            raise UserError(
                "training workers",
                f"they failed for good ({_first_line(self._error)})",
                f"see Ray's logs of this run, {self._run_dir.name}; out of memory is the usual "
                "cause: lower batch_size, resolution or the number of workers",
            ) from self._error
        if self._outcome is None:
            return
        if self._outcome.fix is None:
            raise RuntimeError(f"{self._outcome.where} failed:\n{self._outcome.found}")
        raise UserError(self._outcome.where, self._outcome.found, self._outcome.fix)


def run_worker(config: dict[str, _Orders]) -> SetupError | None:
    """Ray Train calls this in every worker of the group, and again after a restart."""
    import ray.train
    import ray.train.torch

    orders = config[ORDERS]
    torch.set_num_threads(orders.threads)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    post = Post(orders.mailbox)
    worker = Worker(
        orders.job,
        Group(rank, context.get_world_size()),
        ray.train.torch.get_device(),
        on_event=post,
        # Rank 0 alone asks, since a stop of one worker is a stop of all.
        stopped=post.stopped if rank == 0 else lambda: False,
        ledger=Ledger(orders.ledger) if rank == 0 else None,
        max_deaths=orders.max_deaths,
    )
    try:
        return worker.run()
    finally:
        post.flush()


def _forward_events(
    mailbox: Any,
    fit: _Fit,
    on_event: OnEvent,
    size: _Size,
) -> None:
    """Hand events to the caller until the workers are done and nothing is left to hand over."""
    import ray

    heard = False
    started = time.monotonic()
    while True:
        finished = not fit.is_alive()
        events = ray.get(mailbox.take.remote())
        for event in events:
            on_event(event)
        heard = heard or bool(events)
        if finished and not events:
            return
        if not heard and time.monotonic() - started > WAITING_NOTICE_S:
            heard = True
            free = ray.available_resources()
            gpu = f" and {size.gpus_per_worker:g} GPU each" if size.use_gpu else ""
            found = (
                f"waiting for {size.least_workers} × {size.cpus_per_worker} CPU{gpu}; free: "
                f"{free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"
            )
            on_event(Waiting(found))
        if not events:
            time.sleep(POLL_INTERVAL_S)


def _with_absolute_paths(job: SweepJob) -> SweepJob:
    """Workers run in folders of their own, so relative paths would lead elsewhere there."""
    return replace(
        job,
        base=absolute_base(job.base),
        dataset_path=str(Path(job.dataset_path).resolve()),
        latents_dir=str(Path(job.latents_dir).resolve()),
        score_dir=str(Path(job.score_dir).resolve()),
        store=None if job.store is None else str(Path(job.store).resolve()),
        trials=tuple(_at_absolute_paths(trial) for trial in job.trials),
    )


def _at_absolute_paths(trial: TrialSpec) -> TrialSpec:
    cuts = tuple(map(_at_absolute_paths, trial.cuts))
    return replace(trial, trial_dir=Path(trial.trial_dir).resolve(), cuts=cuts)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Runs a prepared sweep: trials on Ray Train, runs in MLflow, the winner exported and registered.

A `PreparedSweep` in, a `FinishedSweep` out. Every step looks at the store first, so that a sweep
that was killed goes on and never does or registers anything twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from captioning import DatasetVersion, UserError
from services.coordinator.recorder import Recorder
from services.coordinator.training_progress import TrainingProgress
from services.farm.machine import uses_gpu
from services.farm.progress import UNWATCHED, Progress
from services.farm.settings import Home
from services.registry.registry import Registry
from services.registry.winner import Registered, register_winner
from services.sweeps.files import (
    AskedSweep,
    candidates,
    choose_whole,
    failures,
    is_best_whole,
    is_scored,
    scores_dir,
    sweep_dir,
)
from services.sweeps.plan import PlannedTrial, SweepPlan
from services.sweeps.prepare import PreparedSweep, steps_done
from training import (
    Candidate,
    Event,
    OnEvent,
    SweepJob,
    TrialSpec,
    Winner,
    run_trials,
)


@dataclass(frozen=True)
class FinishedSweep:
    """A sweep with its winner, exported and registered."""

    asked: AskedSweep
    plan: SweepPlan
    dataset: DatasetVersion
    winner: Winner
    registered: Registered


def run_sweep(
    home: Home,
    prepared: PreparedSweep,
    start_ray: Callable[[], None],
    progress: Progress = UNWATCHED,
    on_event: OnEvent | None = None,
) -> FinishedSweep:
    """Train, score, record, choose, export and register.

    `start_ray` is called if there is work for Ray; see `services.farm.engine.ray_when_needed`.
    `on_event` is called with every event of the training, in order (`training.events`). Raises
    UserError when no trial was finished; what is done by then is kept, and MLflow says how the
    sweep has ended.
    """
    registry = Registry(home.tracking_uri, home.artifacts)
    recorder = Recorder(home, prepared, registry)
    try:
        _train(home, prepared, start_ray, recorder, progress, on_event)
        with progress.step(f"{prepared.dataset.character}: runs recorded in MLflow") as step:
            run_ids = recorder.finish(step)
        winner = _choose(home, prepared)
        recorder.verifying()
        registered = register_winner(
            home, prepared.asked, prepared.dataset, winner, registry, run_ids, progress
        )
    except KeyboardInterrupt:
        recorder.end("cancelled")
        raise
    except Exception:
        recorder.end("failed")
        raise
    recorder.end("succeeded")
    return FinishedSweep(prepared.asked, prepared.plan, prepared.dataset, winner, registered)


def _train(
    home: Home,
    prepared: PreparedSweep,
    start_ray: Callable[[], None],
    recorder: Recorder,
    progress: Progress,
    on_event: OnEvent | None,
) -> None:
    """Train and score what of the sweep is not done yet, on Ray."""
    plan, settings = prepared.plan, home.settings
    title = f"{prepared.dataset.character}: {len(plan.trained)} trials trained and scored"
    if _is_done(home, prepared):
        progress.say(f"{title} before")
        return
    start_ray()
    with progress.step(title, sum(planned.recipe.steps for planned in plan.trained)) as step:
        training = TrainingProgress(plan, steps_done(home, plan), step)

        def heard(event: Event) -> None:
            training(event)
            if on_event is not None:
                on_event(event)
            recorder(event)

        run_trials(
            _job(home, prepared),
            heard,
            settings.workers,
            settings.cpus_per_worker,
            uses_gpu(settings),
            storage=sweep_dir(home.store, prepared.asked) / "ray",
            min_workers=settings.min_workers,
            gpus_per_worker=settings.gpus_per_worker,
        )
        training.tell_memory(progress)
    if training.scoring_seconds:
        seconds = statistics.median(training.scoring_seconds)
        prepared.estimator.keep_scoring_seconds(prepared.asked.config.scoring, seconds)


def _job(home: Home, prepared: PreparedSweep) -> SweepJob:
    asked, plan, settings = prepared.asked, prepared.plan, home.settings
    return SweepJob(
        base=asked.base,
        dataset_path=str(prepared.dataset.path),
        latents_dir=str(home.store.latents),
        trials=tuple(
            replace(
                _spec(home, planned),
                cuts=tuple(_spec(home, cut) for cut in plan.cuts_of(planned.trial)),
            )
            for planned in plan.trained
        ),
        scoring=asked.config.scoring,
        score_dir=str(scores_dir(home.store, asked)),
        store=str(home.store.root),
        trials_per_pack=settings.trials_per_pack,
        gradient_checkpointing=settings.gradient_checkpointing,
        compile=settings.compile,
        strategy=settings.strategy,
        offload_base=settings.offload_base,
        share_optimizers=settings.share_optimizers,
        keep_all_states=settings.optimizer_states == "all",
    )


def _spec(home: Home, planned: PlannedTrial) -> TrialSpec:
    return TrialSpec(planned.trial, planned.recipe, home.store.runs / planned.trial)


def _is_done(home: Home, prepared: PreparedSweep) -> bool:
    """Whether every checkpoint that the sweep asks for is there and scored, and the best is whole.

    The bytes of the best one alone are verified, since they are what is exported. Where they are
    damaged, training is asked to make them again.
    """
    found = _candidates(home, prepared)
    return is_scored(prepared.plan, found) and is_best_whole(
        home.store, found, prepared.asked.config.scoring.limits
    )


def _candidates(home: Home, prepared: PreparedSweep) -> list[Candidate]:
    return candidates(
        home.store,
        prepared.asked,
        prepared.plan.trials,
        prepared.dataset,
        home.settings.workers,
    )


def _choose(home: Home, prepared: PreparedSweep) -> Winner:
    lost = failures(home.store, prepared.plan.trials)
    scored = _candidates(home, prepared)
    winner = choose_whole(home.store, scored, prepared.asked.config.scoring.limits)
    if winner is None:
        reasons = "; ".join(f"{trial}: {error}" for trial, error in lost.items())
        raise UserError(
            f"sweep {prepared.asked.sweep}",
            f"no trial was finished ({reasons})",
            "correct the recipe and run the same command again",
        )
    return winner

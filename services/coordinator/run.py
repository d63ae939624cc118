"""Runs a sweep: trials on Ray Train, runs in MLflow, the winner exported and registered.

A dataset version and a sweep config in, a `Finished` sweep out. Every step looks at the store
first, so that a command that was killed goes on and never does or registers anything twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from captioning import DatasetVersion, UserError, load_config, require_model
from services.cli.leaderboard import print_leaderboard
from services.cli.progress import Display, Step
from services.cli.watching import Watcher
from services.datasets.versions import newest_dataset
from services.farm.engine import ray_when_needed
from services.farm.machine import memory_bytes, uses_gpu
from services.farm.settings import Home
from services.registry.registry import Registry
from services.registry.trial_facts import DatasetReference, TrialFacts
from services.registry.winner import Registered, register_winner
from services.report.trial_sheet import trial_sheet
from services.sweeps.class_sets import check_class_pictures, with_class_sets
from services.sweeps.estimate_text import known_line
from services.sweeps.estimates import Estimator, checkpoints_left
from services.sweeps.files import (
    AskedSweep,
    candidates,
    failures,
    record_sweep,
    scores_dir,
    sweep_dir,
)
from services.sweeps.plan import PlannedTrial, SweepConfig, SweepPlan, plan_sweep
from services.sweeps.trial_files import read_effective_batch, read_measures, step_folders
from services.sweeps.unused_settings import refuse_unused
from training import (
    STARTER_BASE,
    BaseFacts,
    Candidate,
    SweepJob,
    TrialSpec,
    Winner,
    base_facts,
    check_on_base,
    choose_winner,
    refuse_quantised_shares,
    run_trials,
    views_per_image,
)


@dataclass(frozen=True)
class Finished:
    """A sweep with its winner, exported and registered."""

    record: AskedSweep
    plan: SweepPlan
    dataset: DatasetVersion
    winner: Winner
    registered: Registered
    registry: Registry


def sweep_command(home: Home, character: str, config: Path | None, console: Console) -> None:
    """`lorafarm sweep`: the newest dataset version of `character`, then the leaderboard."""
    parsed = load_config(SweepConfig, config) if config else SweepConfig()
    dataset = newest_dataset(home, character, console)
    source = str(config) if config else "the default sweep"
    prepared = prepare_sweep(home, dataset, parsed, source, console)
    with ray_when_needed(home) as start_ray:
        finished = run_sweep(home, prepared, console, start_ray)
    print_leaderboard(finished.winner, console)
    console.print(f"registered as [bold]{finished.registered.reference}[/] @candidate")
    console.print(
        f"next: lorafarm promote {finished.registered.name} {finished.registered.version} "
        "--to production"
    )


@dataclass(frozen=True)
class Prepared:
    """A sweep that was checked and planned: nothing about it is wrong that can be known before."""

    record: AskedSweep
    plan: SweepPlan
    dataset: DatasetVersion
    estimator: Estimator


def prepare_sweep(
    home: Home, dataset: DatasetVersion, config: SweepConfig, source: str, console: Console
) -> Prepared:
    """Check the base and plan the trials before anything is started.

    Raises UserError for a base that is no model and for a config that asks for the impossible.
    """
    base, plan, config = plan_config(home, dataset, config, source)
    for warning in plan.warnings:
        console.print(f"[yellow]note:[/] {warning}")
    console.print(f"  {_views(plan, dataset, home.settings.workers)}")
    done = steps_done(home, plan)
    estimator = Estimator(home, base)
    known = known_line(
        estimator.packs(plan.trained, done),
        checkpoints_left(plan.trials, done),
        estimator.scoring_seconds(config.scoring),
        memory_bytes(home.settings),
    )
    if known:
        console.print(f"  {known}")
    record = record_sweep(home.store, dataset, plan, config, base)
    return Prepared(record, plan, dataset, estimator)


def plan_config(
    home: Home, dataset: DatasetVersion, config: SweepConfig, source: str
) -> tuple[BaseFacts, SweepPlan, SweepConfig]:
    """The base, the trials, and the config with what the home's settings add to it.

    Folders of class pictures are kept in the store, and the config names their sets.
    Raises UserError for a base that is no model and for a config that asks for the impossible.
    """
    base = base_facts(config.base or home.settings.base or STARTER_BASE)
    config = with_class_sets(home.store, config)
    plan = plan_sweep(config, dataset, base.content_hash, base.family, source)
    recipes = [planned.recipe for planned in plan.trained]
    refuse_unused(config, recipes, source)
    # A cluster's machines have packages and models of their own.
    trains_here = home.settings.ray_address == "local"
    check_on_base(recipes, base.source, config.scoring.size_px, trains_here)
    if home.settings.strategy != "ddp":
        refuse_quantised_shares(planned.recipe for planned in plan.trials)
    check_class_pictures(home.store, plan, dataset)
    embedder_is_from = f"{source}: scoring.embedder"
    if home.settings.embedder and config.scoring.embedder is None:
        scoring = config.scoring.model_copy(update={"embedder": home.settings.embedder})
        config = config.model_copy(update={"scoring": scoring})
        embedder_is_from = "settings.yaml: embedder"
    if config.scoring.embedder is not None and trains_here:
        _require_embedder(config.scoring.embedder, embedder_is_from)
    return base, plan, config


def _require_embedder(embedder: str, field: str) -> None:
    try:
        require_model(embedder)
    except UserError as error:
        raise UserError(field, f"{error.where}: {error.found}", error.fix) from error


def steps_done(home: Home, plan: SweepPlan) -> dict[str, int]:
    """The last checkpoint's step of every trial of the plan; 0 where there is none."""
    return {
        planned.trial: max(step_folders(home.store.runs / planned.trial), default=0)
        for planned in plan.trials
    }


def _views(plan: SweepPlan, dataset: DatasetVersion, workers: int) -> str:
    """What the trials' steps come to, for a person who thinks in views per image."""
    pictures = len(dataset.train)
    seen = {
        f"{recipe.steps} steps = {views_per_image(recipe.steps, recipe, pictures, workers):.0f} "
        f"views of each of {pictures} pictures"
        for recipe in (planned.recipe for planned in plan.trials)
    }
    return "; ".join(sorted(seen))


def run_sweep(
    home: Home, prepared: Prepared, console: Console, start_ray: Callable[[], None]
) -> Finished:
    """Train, score, record, choose, export and register; Ray is started if there is work for it."""
    record, plan, dataset = prepared.record, prepared.plan, prepared.dataset
    registry = Registry(home.tracking_uri, home.artifacts)
    tags = {"base_hash": record.base_hash, "family": record.family, "dataset": dataset.name}
    parent = registry.runs.open_sweep(dataset.character, record.sweep, tags)
    recorder = _Recorder(home, prepared, registry, parent)
    job = SweepJob(
        base=record.base,
        dataset_path=str(dataset.path),
        latents_dir=str(home.store.latents),
        trials=tuple(
            replace(
                _spec(home, planned),
                cuts=tuple(_spec(home, cut) for cut in plan.cuts_of(planned.trial)),
            )
            for planned in plan.trained
        ),
        scoring=record.config.scoring,
        score_dir=str(scores_dir(home.store, record)),
        store=str(home.store.root),
        max_slots=home.settings.trials_per_pack,
        gradient_checkpointing=home.settings.gradient_checkpointing,
        compile=home.settings.compile,
        strategy=home.settings.strategy,
        offload_base=home.settings.offload_base,
        share_optimizers=home.settings.share_optimizers,
        keep_all_states=home.settings.optimizer_states == "all",
    )
    settings = home.settings
    with Display(console) as display:
        steps = sum(planned.recipe.steps for planned in plan.trained)
        title = f"{dataset.character}: {len(plan.trained)} trials trained and scored"
        if _is_done(home, prepared):
            display.say(f"  {title} before")
        else:
            start_ray()
            with display.step(title, steps) as step:
                watcher = Watcher(plan, steps_done(home, plan), recorder.trial, display, step)
                run_trials(
                    job,
                    watcher,
                    settings.workers,
                    settings.cpus_per_worker,
                    uses_gpu(settings),
                    storage=sweep_dir(home.store, record) / "ray",
                    min_workers=settings.min_workers,
                    gpus_per_worker=settings.gpus_per_worker,
                )
                watcher.tell_memory()
            if watcher.scoring_seconds:
                seconds = statistics.median(watcher.scoring_seconds)
                prepared.estimator.keep_scoring_seconds(record.config.scoring, seconds)
        with display.step(f"{dataset.character}: runs recorded in MLflow") as step:
            run_ids = recorder.finish(step)
    winner = _choose(home, prepared)
    registered = register_winner(home, record, dataset, winner, registry, run_ids, console)
    registry.runs.close_sweep(parent)
    return Finished(record, plan, dataset, winner, registered, registry)


def _spec(home: Home, planned: PlannedTrial) -> TrialSpec:
    return TrialSpec(planned.trial, planned.recipe, home.store.runs / planned.trial)


def _is_done(home: Home, prepared: Prepared) -> bool:
    """Whether every checkpoint that the sweep asks for is there and scored as it asks."""
    scored = {(c.trial, c.step) for c in _candidates(home, prepared)}
    return all(
        (planned.trial, step) in scored
        for planned in prepared.plan.trials
        for step in planned.recipe.checkpoint_steps()
    )


def _candidates(home: Home, prepared: Prepared) -> list[Candidate]:
    return candidates(
        home.store,
        prepared.record,
        prepared.plan.trials,
        prepared.dataset,
        home.settings.workers,
    )


def _choose(home: Home, prepared: Prepared) -> Winner:
    lost = failures(home.store, prepared.plan.trials)
    scored = _candidates(home, prepared)
    if not scored:
        reasons = "; ".join(f"{trial}: {error}" for trial, error in lost.items())
        raise UserError(
            f"sweep {prepared.record.sweep}",
            f"no trial was finished ({reasons})",
            "correct the recipe and run the same command again",
        )
    return choose_winner(scored, prepared.record.config.scoring.limits)


class _Recorder:
    """Brings the MLflow runs up to what the trials' folders hold."""

    def __init__(self, home: Home, prepared: Prepared, registry: Registry, parent: str) -> None:
        self._home, self._prepared = home, prepared
        self._registry, self._parent = registry, parent

    def trial(self, planned: PlannedTrial, state: str) -> str:
        """Record one trial and return its run id."""
        record, dataset = self._prepared.record, self._prepared.dataset
        trial_dir = self._home.store.runs / planned.trial
        scores = {step: read_measures(folder) for step, folder in step_folders(trial_dir).items()}
        return self._registry.runs.record_trial(
            self._parent,
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
                scores={step: measures for step, measures in scores.items() if measures},
                state=state,
                # Tags and not params: a later run may come down to smaller ones.
                tags={
                    "base_hash": record.base_hash,
                    "family": record.family,
                    **read_effective_batch(trial_dir),
                    **({"cut_of": planned.cut_of} if planned.cut_of else {}),
                },
            ),
        )

    def finish(self, step: Step) -> dict[str, str]:
        """Record every trial for good; trial to run id."""
        trials = self._prepared.plan.trials
        lost = failures(self._home.store, trials)
        run_ids = {}
        for done, planned in enumerate(trials, start=1):
            state = "failed" if (planned.cut_of or planned.trial) in lost else "succeeded"
            run_ids[planned.trial] = self.trial(planned, state)
            sheet = trial_sheet(
                self._home.store,
                self._prepared.record,
                self._prepared.dataset,
                planned,
                self._home.settings.workers,
            )
            if sheet is not None:
                self._registry.runs.log_picture(run_ids[planned.trial], "contact-sheet", sheet)
            step.advance_to(done, len(trials))
        return run_ids

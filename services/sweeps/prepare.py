"""Checks and plans a sweep before anything is started.

A dataset version and a sweep's config in, a `PreparedSweep` out: nothing about it is wrong that can
be known before. What was asked is written to the store, so that a sweep that is stopped is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from captioning import DatasetVersion, UserError, require_model
from services.farm.machine import memory_bytes
from services.farm.settings import Home
from services.sweeps.class_sets import check_class_pictures, with_class_sets
from services.sweeps.estimates import Estimator, PackEstimate, checkpoints_left
from services.sweeps.files import AskedSweep, record_sweep
from services.sweeps.plan import SweepConfig, SweepPlan, plan_sweep
from services.sweeps.unused_settings import refuse_unused
from training import (
    STARTER_BASE,
    BaseFacts,
    base_facts,
    check_on_base,
    refuse_quantised_shares,
    step_folders,
    views_per_image,
)


@dataclass(frozen=True, order=True)
class PlannedViews:
    """What the steps of a trial come to, for a person who thinks in views per picture."""

    steps: int
    views: float  # of each training picture, on average
    pictures: int  # that are trained on


@dataclass(frozen=True)
class SweepEstimate:
    """What of a sweep's time and memory is known from earlier measurements on this machine."""

    packs: tuple[PackEstimate, ...]
    checkpoints: int  # that are still to be scored
    scoring_s: float | None  # that one of them takes; None if none was scored here
    memory_bytes: int | None  # that one worker may take; None if the accelerator is not here


@dataclass(frozen=True)
class PreparedSweep:
    """A sweep that was checked and planned."""

    asked: AskedSweep
    plan: SweepPlan
    dataset: DatasetVersion
    warnings: tuple[str, ...]  # what the person should know about the search, in sentences
    views: tuple[PlannedViews, ...]  # one of each length of trials, the shortest first
    estimate: SweepEstimate
    estimator: Estimator  # keeps what the sweep measures of its scoring


def prepare_sweep(
    home: Home, dataset: DatasetVersion, config: SweepConfig, source: str
) -> PreparedSweep:
    """Check the base, plan the trials and write down what was asked; nothing is started.

    `source` names the config in errors. Raises UserError for a base that is no model and for a
    config that asks for the impossible.
    """
    base, plan, config = plan_config(home, dataset, config, source)
    done = steps_done(home, plan)
    estimator = Estimator(home, base)
    estimate = SweepEstimate(
        packs=tuple(estimator.packs(plan.trained, done)),
        checkpoints=checkpoints_left(plan.trials, done),
        scoring_s=estimator.scoring_seconds(config.scoring),
        memory_bytes=memory_bytes(home.settings),
    )
    return PreparedSweep(
        asked=record_sweep(home.store, dataset, plan, config, base),
        plan=plan,
        dataset=dataset,
        warnings=plan.warnings,
        views=_views(plan, dataset, home.settings.workers),
        estimate=estimate,
        estimator=estimator,
    )


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


def _views(plan: SweepPlan, dataset: DatasetVersion, workers: int) -> tuple[PlannedViews, ...]:
    pictures = len(dataset.train)
    recipes = [planned.recipe for planned in plan.trials]
    views = {
        PlannedViews(one.steps, views_per_image(one.steps, one, pictures, workers), pictures)
        for one in recipes
    }
    return tuple(sorted(views))

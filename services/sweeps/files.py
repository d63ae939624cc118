"""A sweep on disk: what was asked, and what its trials have left so far.

`sweeps/<character>/<sweep>/sweep.json` in and out; candidates are read back from the trials'
folders, so that a leaderboard or a report needs nothing but the store.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from captioning import DatasetVersion, Store, UserError, load_dataset, parse_config, write_atomic
from services.sweeps.plan import PlannedTrial, SweepConfig, SweepPlan, plan_sweep
from training import (
    BaseFacts,
    BaseScores,
    Candidate,
    Checkpoint,
    Limits,
    Score,
    ScoringConfig,
    Winner,
    checkpoint_dir,
    choose_winner,
    is_whole,
    list_checkpoints,
    read_failure,
    read_score,
    samples_per_step_at,
    views_per_image,
)

SWEEP_FILE = "sweep.json"


class AskedSweep(BaseModel):
    """One sweep of one character on one dataset version and base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sweep: str
    character: str
    dataset: str
    base: str
    base_hash: str
    family: str
    config: SweepConfig
    trials: tuple[str, ...]
    started: str  # ISO 8601, UTC


def record_sweep(
    store: Store, dataset: DatasetVersion, plan: SweepPlan, config: SweepConfig, base: BaseFacts
) -> AskedSweep:
    """Keep what was asked, and no more; a sweep that is asked for again becomes the newest one."""
    asked = AskedSweep(
        sweep=plan.sweep,
        character=dataset.character,
        dataset=dataset.name,
        base=base.source,
        base_hash=base.content_hash,
        family=base.family,
        config=config,
        trials=tuple(trial.trial for trial in plan.trials),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    file = sweep_dir(store, asked) / SWEEP_FILE
    write_atomic(file, (asked.model_dump_json(indent=1, exclude_unset=True) + "\n").encode())
    return asked


def sweep_dir(store: Store, asked: AskedSweep) -> Path:
    return store.sweeps / asked.character / asked.sweep


@dataclass(frozen=True)
class ScoredSweep:
    """A sweep with what of it is scored so far, on the dataset version that it was run on."""

    asked: AskedSweep
    dataset: DatasetVersion
    plan: SweepPlan
    candidates: list[Candidate]
    unscored: str | None  # a newer sweep that has no scored checkpoint yet


def newest_scored(store: Store, character: str, workers: int) -> ScoredSweep:
    """The sweep of the character that was started last, of those with a scored checkpoint.

    Raises UserError when there is none. `workers`: see `candidates`.
    """
    asked_sweeps = sorted(sweeps(store, character), key=lambda one: one.started, reverse=True)
    if not asked_sweeps:
        raise UserError(
            f"character {character}", "no sweep yet", f"run `lorafarm sweep {character}`"
        )
    for asked in asked_sweeps:
        dataset = dataset_of(store, asked)
        plan = plan_sweep(asked.config, dataset, asked.base_hash, asked.family, asked.sweep)
        if found := candidates(store, asked, plan.trials, dataset, workers):
            newer = None if asked is asked_sweeps[0] else asked_sweeps[0].sweep
            return ScoredSweep(asked, dataset, plan, found, newer)
    raise UserError(
        f"sweep {asked_sweeps[0].sweep}",
        "no scored checkpoint yet",
        f"run the same `lorafarm sweep {character} --config ...` again; it goes on from what is "
        "done",
    )


def sweeps(store: Store, character: str) -> Iterator[AskedSweep]:
    """All sweeps of a character."""
    for file in sorted((store.sweeps / character).glob(f"*/{SWEEP_FILE}")):
        yield parse_config(AskedSweep, json.loads(file.read_text("utf-8")), str(file))


def dataset_of(store: Store, asked: AskedSweep) -> DatasetVersion:
    """The dataset version the sweep was run on, verified."""
    return load_dataset(store.datasets / asked.character / asked.dataset)


def scores_dir(store: Store, asked: AskedSweep) -> Path:
    """Where the bare base's pictures and scores lie; sweeps of one character share them."""
    return store.sweeps / asked.character / "base"


def candidates(
    store: Store,
    asked: AskedSweep,
    trials: tuple[PlannedTrial, ...],
    dataset: DatasetVersion,
    workers: int,
) -> list[Candidate]:
    """Every checkpoint of the sweep that was scored as the sweep asks for.

    A batch is one worker's, so that `workers` decide what a step is in views, unless the checkpoint
    says how many samples it had.

    A trial that several sweeps share may still have the scores of another one.
    """
    wanted = _comparable(asked.config.scoring)
    found = []
    for planned in trials:
        network = planned.recipe.network
        for checkpoint in list_checkpoints(store.runs / planned.trial):
            score = read_score(checkpoint.path)
            if score is not None and _comparable(score.config) == wanted:
                step = checkpoint.step
                samples = samples_per_step_at(checkpoint.path)
                pictures = len(dataset.train)
                views = views_per_image(step, planned.recipe, pictures, workers, samples)
                found.append(
                    Candidate(
                        planned.trial,
                        step,
                        network.rank,
                        network.method,
                        score,
                        views,
                        network.nested_ranks or (),
                        planned.variant,
                    )
                )
    return found


def _comparable(config: ScoringConfig) -> ScoringConfig:
    """The config without its limits, which judge scores and do not change them."""
    return config.model_copy(update={"limits": Limits()})


def is_scored(plan: SweepPlan, candidates: Sequence[Candidate]) -> bool:
    """Whether the candidates hold every checkpoint that the plan asks for."""
    scored = {(one.trial, one.step) for one in candidates}
    return all(
        (planned.trial, step) in scored
        for planned in plan.trials
        for step in planned.recipe.checkpoint_steps()
    )


def is_best_whole(store: Store, candidates: Sequence[Candidate], limits: Limits) -> bool:
    """Whether the checkpoint that wins by its scores is whole; reads the bytes of no other."""
    return is_intact(store, choose_winner(candidates, limits).candidate)


def choose_whole(store: Store, candidates: Sequence[Candidate], limits: Limits) -> Winner | None:
    """The winner among the candidates, every byte of its checkpoint verified.

    One whose checkpoint is damaged is logged and left out of the ranking. None when none is whole.
    """
    left = list(candidates)
    while left:
        winner = choose_winner(left, limits)
        if is_intact(store, winner.candidate):
            return winner
        left = [candidate for candidate in left if candidate is not winner.candidate]
    return None


def is_intact(store: Store, candidate: Candidate) -> bool:
    """Whether every byte of a candidate's checkpoint is as it was saved."""
    path = checkpoint_dir(store.runs / candidate.trial, candidate.step)
    return is_whole(Checkpoint(candidate.step, path))


def failures(store: Store, trials: tuple[PlannedTrial, ...]) -> dict[str, str]:
    """Trial to the error that ended it."""
    found = {planned.trial: read_failure(store.runs / planned.trial) for planned in trials}
    return {trial: error for trial, error in found.items() if error is not None}


def base_scores(store: Store, asked: AskedSweep, score: Score) -> BaseScores:
    """The bare base's scores that `score` was measured against."""
    return BaseScores.load(scores_dir(store, asked) / score.base_key)

"""Fills the report of finished sweeps from what the store and the registry hold."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from pathlib import Path

from captioning import Sample, load_skipped
from services.farm.settings import Home
from services.registry.exports import exports_of
from services.registry.releases import open_registry
from services.report.data import (
    CaptionedPicture,
    CharacterReport,
    DatasetContent,
    ExportedFile,
    ReportData,
    SkippedFile,
    TrialResult,
    WinnerChoice,
    installed_versions,
    read_trial,
)
from services.report.page import build_report
from services.sweeps.files import base_scores
from services.sweeps.leaderboard import leaderboard
from services.sweeps.plan import PlannedTrial
from training import (
    SUBJECT_SLOT,
    Candidate,
    Winner,
    approximation,
    begun_with,
    views_per_image,
)


def write_report(
    home: Home, characters: list[str], out: Path, seconds: float | None = None
) -> Path:
    """One offline HTML file on each character's newest scored sweep; `seconds`: the whole job's.

    Raises UserError for a character of which no sweep has a scored checkpoint that is whole.
    """
    data = ReportData(
        characters=tuple(character_report(home, name) for name in characters),
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        seconds=seconds,
        title="Sweep report: " + ", ".join(characters),
        provenance={"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}
        | installed_versions(),
    )
    return build_report(data, out)


def character_report(home: Home, name: str) -> CharacterReport:
    """What a report says about the newest scored sweep of one character."""
    store = home.store
    found = leaderboard(home, name)
    sweep, winner = found.sweep, found.winner
    asked, dataset, plan = sweep.asked, sweep.dataset, sweep.plan
    base = base_scores(store, asked, winner.candidate.score)
    reference, aliases = _registered(home, f"{name}.{asked.family}", winner.candidate)
    score = winner.candidate.score
    return CharacterReport(
        name=name,
        trigger=dataset.trigger,
        class_word=dataset.class_word,
        family=asked.family,
        base=asked.base,
        dataset=DatasetContent(
            version=dataset.name,
            manifest_sha256=dataset.manifest_sha256,
            train=_captioned(dataset.train),
            holdout=_captioned(dataset.holdout),
            skipped=tuple(SkippedFile(s.source, s.reason) for s in load_skipped(store, name)),
        ),
        trials=tuple(_trial(home, planned, winner, len(dataset.train)) for planned in plan.trials),
        winner=WinnerChoice(
            winner.candidate.trial, winner.candidate.step, winner.reason, winner.passed_guards
        ),
        prompts=tuple(
            prompt.replace(SUBJECT_SLOT, f"{dataset.trigger}, {dataset.class_word}")
            for prompt in asked.config.scoring.prompts
        ),
        notes=score.notes,
        base_pictures=base.row(base.folder),
        exports=tuple(
            ExportedFile(
                name=report.path.relative_to(folder).as_posix(),
                format=report.format,
                sha256=report.sha256,
                size_bytes=report.size_bytes,
                max_error=report.max_error,
            )
            for folder, report in exports_of(store, name, winner.candidate)
        ),
        reference=reference,
        aliases=aliases,
        limits={
            key: value
            for key, value in asked.config.scoring.limits.model_dump().items()
            if value is not None
        },
        provenance={
            "sweep": asked.sweep,
            "base hash": asked.base_hash[:16],
            "embedder": f"{score.embedder}@{score.embedder_revision}",
            "references": f"{score.reference_count} {score.references} pictures",
            "floor and ceiling": f"{score.floor:.3f} and {score.ceiling:.3f} (raw cosine)",
            "pictures per checkpoint": str(asked.config.scoring.images_per_checkpoint()),
        },
    )


def _captioned(samples: tuple[Sample, ...]) -> tuple[CaptionedPicture, ...]:
    return tuple(CaptionedPicture(s.path, s.caption, s.path.name) for s in samples)


def _trial(home: Home, planned: PlannedTrial, winner: Winner, pictures: int) -> TrialResult:
    standings = {
        standing.candidate.step: standing
        for standing in winner.table
        if standing.candidate.trial == planned.trial
    }
    network = planned.recipe.network
    trial_dir = home.store.runs / planned.trial
    return read_trial(
        trial_dir,
        trial=planned.trial,
        method=network.method,
        rank=network.rank,
        variant=planned.variant,
        note=approximation(network.nested_ranks) if network.nested_ranks else "",
        standings=standings,
        views_per_step=views_per_image(
            1, planned.recipe, pictures, home.settings.workers, begun_with(trial_dir)
        ),
    )


def _registered(home: Home, name: str, candidate: Candidate) -> tuple[str, tuple[str, ...]]:
    """The registry's reference and aliases of the winner; empty when it is not registered."""
    registry = open_registry(home)
    if name not in registry.names():
        return "", ()
    for version in registry.versions(name):
        if version.trial == candidate.trial and version.step == candidate.step:
            return f"{name}/{version.version}", version.aliases
    return "", ()

"""Exports a sweep's winner and registers it.

A scored checkpoint in; verified files and a registry version out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from captioning import DatasetVersion, Store, content_hash, write_atomic
from services.farm.progress import UNWATCHED, Progress
from services.farm.settings import Home
from services.registry.bundle import AdapterCard
from services.registry.registry import CANDIDATE, Registry
from services.sweeps.files import AskedSweep
from training import (
    Candidate,
    ExportReport,
    Winner,
    approximation,
    checkpoint_dir,
    export_adapter,
    load_base,
    load_checkpoint,
)

# Adapters are trained and scored at full strength, so that is what is recommended.
RECOMMENDED_WEIGHT = 1.0
EXPORTS_FILE = "exports.json"
# What diffusers' load_lora_weights looks for in a folder.
DIFFUSERS_FOLDER, DIFFUSERS_FILE = "diffusers", "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Registered:
    """The winner in the registry, and the exported files it consists of."""

    name: str
    version: int
    exports: tuple[ExportReport, ...]

    @property
    def reference(self) -> str:
        return f"{self.name}/{self.version}"


def register_winner(
    home: Home,
    asked: AskedSweep,
    dataset: DatasetVersion,
    winner: Winner,
    registry: Registry,
    run_ids: Mapping[str, str],
    progress: Progress = UNWATCHED,
) -> Registered:
    """Export the winning checkpoint in both formats, register it and point `candidate` at it.

    `run_ids` gives the MLflow run of each trial. Doing it again gives the same version. Raises
    VerificationError when a file does not load back as what was trained; then nothing is
    registered.
    """
    candidate = winner.candidate
    checkpoint = checkpoint_dir(home.store.runs / candidate.trial, candidate.step)
    sha256 = content_hash(checkpoint / "adapter.safetensors")
    name = f"{asked.character}.{asked.family}"
    with progress.step(f"{asked.character}: winner exported and verified"):
        exports = export_both(home.store, asked, dataset, checkpoint, sha256)
    with progress.step(f"{asked.character}: winner registered as {name}"):
        card = _card(asked, dataset, candidate, sha256)
        kohya, diffusers = exports
        files = {
            "kohya": kohya.path,
            DIFFUSERS_FOLDER: diffusers.path.parent,
            "manifest": dataset.path / "manifest.json",
        }
        version = registry.register(name, run_ids[candidate.trial], files, card)
        registry.set_alias(name, version, CANDIDATE)
    return Registered(name, version, exports)


def export_both(
    store: Store, asked: AskedSweep, dataset: DatasetVersion, checkpoint: Path, sha256: str
) -> tuple[ExportReport, ExportReport]:
    """The checkpoint as a kohya-named and as a diffusers file; made once per checkpoint.

    The kohya file's name tells character, recipe and step, since tools keep serving an old file
    when a new one takes its name.
    """
    folder = store.adapters / asked.character / sha256[:16]
    known = _read_exports(folder)
    if known is not None:
        return known
    contents = load_checkpoint(checkpoint)
    network = contents.recipe.network
    stem = f"{asked.character}-{network.method}-r{network.rank}-s{contents.step}-{sha256[:8]}"
    base = load_base(asked.base)
    kohya = export_adapter(
        checkpoint, base, folder / f"{stem}.safetensors", "kohya", dataset=dataset
    )
    diffusers = export_adapter(
        checkpoint, base, folder / DIFFUSERS_FOLDER / DIFFUSERS_FILE, "diffusers", dataset=dataset
    )
    rows = [
        asdict(report) | {"path": report.path.relative_to(folder).as_posix()}
        for report in (kohya, diffusers)
    ]
    write_atomic(folder / EXPORTS_FILE, json.dumps(rows, indent=1).encode())
    return kohya, diffusers


def exports_of(
    store: Store, character: str, candidate: Candidate
) -> tuple[tuple[Path, ExportReport], ...]:
    """The exported files of a checkpoint, each with its folder; empty when it was not exported."""
    checkpoint = checkpoint_dir(store.runs / candidate.trial, candidate.step)
    sha256 = content_hash(checkpoint / "adapter.safetensors")
    folder = store.adapters / character / sha256[:16]
    return tuple((folder, report) for report in _read_exports(folder) or ())


def _card(
    asked: AskedSweep, dataset: DatasetVersion, candidate: Candidate, sha256: str
) -> AdapterCard:
    return AdapterCard(
        character=asked.character,
        family=asked.family,
        checkpoint_sha256=sha256,
        trial=candidate.trial,
        step=candidate.step,
        method=candidate.method,
        rank=candidate.rank,
        base=asked.base,
        base_hash=asked.base_hash,
        dataset=f"{dataset.character}/{dataset.name}",
        trigger=dataset.trigger,
        class_word=dataset.class_word,
        recommended_weight=RECOMMENDED_WEIGHT,
        scores=candidate.score.measures(),
        approximate=approximation(candidate.nested_ranks) if candidate.nested_ranks else "",
    )


def _read_exports(folder: Path) -> tuple[ExportReport, ExportReport] | None:
    """The reports of an earlier export when its files are whole."""
    file = folder / EXPORTS_FILE
    if not file.exists():
        return None
    rows = json.loads(file.read_text("utf-8"))
    kohya, diffusers = (ExportReport(**row | {"path": folder / row["path"]}) for row in rows)
    for report in (kohya, diffusers):
        if not report.path.exists() or content_hash(report.path) != report.sha256:
            return None
    return kohya, diffusers

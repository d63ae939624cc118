"""Exports a sweep's winner and registers it.

A scored checkpoint in; verified files and a registry version out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from captioning import DatasetVersion, Store, content_hash
from services.farm.progress import UNWATCHED, Progress
from services.farm.settings import Home
from services.registry.bundle import AdapterCard
from services.registry.exports import exports_dir, read_exports, write_exports
from services.registry.listing import keep_list
from services.registry.registry import CANDIDATE, Registry
from services.sweeps.files import AskedSweep
from training import (
    Candidate,
    ExportReport,
    Winner,
    approximation,
    checkpoint_dir,
)

# Adapters are trained and scored at full strength, so that is what is recommended.
RECOMMENDED_WEIGHT = 1.0
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
        keep_list(home.tracking_uri, registry)
    return Registered(name, version, exports)


def export_both(
    store: Store, asked: AskedSweep, dataset: DatasetVersion, checkpoint: Path, sha256: str
) -> tuple[ExportReport, ExportReport]:
    """The checkpoint as a kohya-named and as a diffusers file; made once per checkpoint.

    The kohya file's name tells character, recipe and step, since tools keep serving an old file
    when a new one takes its name.
    """
    folder = exports_dir(store, asked.character, sha256)
    known = read_exports(folder)
    if known is not None:
        return known
    from training import export_adapter, load_base, load_checkpoint

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
    write_exports(folder, kohya, diffusers)
    return kohya, diffusers


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

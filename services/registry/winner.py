"""Between the trials and the tools: the winner exported and registered, versions handed out.

Checkpoints in; verified files, registry versions and moved aliases out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from captioning import DatasetVersion, Store, UserError, content_hash, write_atomic
from services.cli.progress import Display
from services.farm.settings import Home
from services.registry.bundle import FORMATS, AdapterCard
from services.registry.registry import CANDIDATE, PRODUCTION, Registry
from services.sweeps.files import AskedSweep
from services.sweeps.trial_files import read_measures
from training import (
    Candidate,
    ExportReport,
    Winner,
    approximation,
    export_adapter,
    load_base,
    load_checkpoint,
)

# Adapters are trained and scored at full strength, so that is what is recommended.
RECOMMENDED_WEIGHT = 1.0
EXPORTS_FILE = "exports.json"
# What diffusers' load_lora_weights looks for in a folder.
DIFFUSERS_FOLDER, DIFFUSERS_FILE = "diffusers", "pytorch_lora_weights.safetensors"
ALIASES = (CANDIDATE, PRODUCTION)


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
    record: AskedSweep,
    dataset: DatasetVersion,
    winner: Winner,
    registry: Registry,
    run_ids: dict[str, str],
    console: Console,
) -> Registered:
    """Export the winning checkpoint in both formats, register it and point `candidate` at it.

    Doing it again gives the same version. Raises VerificationError when a file does not load back
    as what was trained; then nothing is registered.
    """
    candidate = winner.candidate
    checkpoint = home.store.runs / candidate.trial / f"step-{candidate.step:06d}"
    sha256 = content_hash(checkpoint / "adapter.safetensors")
    name = f"{record.character}.{record.family}"
    with Display(console) as display:
        with display.step(f"{record.character}: winner exported and verified"):
            exports = export_both(home.store, record, dataset, checkpoint, sha256)
        with display.step(f"{record.character}: winner registered as {name}"):
            card = _card(record, dataset, candidate, checkpoint, sha256)
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
    store: Store, record: AskedSweep, dataset: DatasetVersion, checkpoint: Path, sha256: str
) -> tuple[ExportReport, ExportReport]:
    """The checkpoint as a kohya-named and as a diffusers file; made once per checkpoint.

    The kohya file's name tells character, recipe and step, since tools keep serving an old file
    when a new one takes its name.
    """
    folder = store.adapters / record.character / sha256[:16]
    contents = load_checkpoint(checkpoint)
    network = contents.recipe.network
    stem = f"{record.character}-{network.method}-r{network.rank}-s{contents.step}-{sha256[:8]}"
    known = _read_exports(folder)
    if known is not None:
        return known
    base = load_base(record.base)
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
    checkpoint = store.runs / candidate.trial / f"step-{candidate.step:06d}"
    sha256 = content_hash(checkpoint / "adapter.safetensors")
    folder = store.adapters / character / sha256[:16]
    return tuple((folder, report) for report in _read_exports(folder) or ())


def promote_command(home: Home, name: str, version: int, alias: str, console: Console) -> None:
    """`lorafarm promote`: move `alias` to a version."""
    if alias not in ALIASES:
        raise UserError(f"--to {alias}", "no such alias", f"use one of: {', '.join(ALIASES)}")
    open_registry(home).set_alias(name, version, alias)
    console.print(f"[green]✓[/] {name}@{alias} is version {version} now")


def export_command(home: Home, reference: str, to: Path, format: str, console: Console) -> None:
    """`lorafarm export`: put a version's file of one format into a folder."""
    if format not in FORMATS:
        raise UserError(
            f"--format {format}", "unknown", f"use one of: {', '.join(sorted(FORMATS))}"
        )
    registry = open_registry(home)
    adapter, files = registry.download(reference, to, format)
    for file in files:
        console.print(f"[green]✓[/] {file}  sha256 {content_hash(file)}", soft_wrap=True)
    console.print(f"trigger: {adapter.tags['trigger']}")


def open_registry(home: Home) -> Registry:
    """The farm's registry; UserError when nothing was ever registered in the embedded one."""
    if home.settings.tracking_uri is None and not (home.path / "mlflow.db").exists():
        raise UserError(
            str(home.path), "nothing is registered yet", "run `lorafarm sweep <character>` first"
        )
    return Registry(home.tracking_uri, home.artifacts)


def _card(
    record: AskedSweep,
    dataset: DatasetVersion,
    candidate: Candidate,
    checkpoint: Path,
    sha256: str,
) -> AdapterCard:
    measures = read_measures(checkpoint)
    if measures is None:
        raise ValueError(f"{checkpoint}: the winner has no scores")
    return AdapterCard(
        character=record.character,
        family=record.family,
        checkpoint_sha256=sha256,
        trial=candidate.trial,
        step=candidate.step,
        method=candidate.method,
        rank=candidate.rank,
        base=record.base,
        base_hash=record.base_hash,
        dataset=f"{dataset.character}/{dataset.name}",
        trigger=dataset.trigger,
        class_word=dataset.class_word,
        recommended_weight=RECOMMENDED_WEIGHT,
        scores=measures,
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

"""The exported files of a checkpoint: what an export wrote down about them, and what is left.

A checkpoint's hash in, reports of whole files out. Nothing here imports torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from captioning import Store, content_hash, write_atomic
from training import Candidate, ExportReport, checkpoint_dir

EXPORTS_FILE = "exports.json"


def exports_dir(store: Store, character: str, sha256: str) -> Path:
    """The folder of a checkpoint's exported files; `sha256` is the hash of its adapter."""
    return store.adapters / character / sha256[:16]


def exports_of(
    store: Store, character: str, candidate: Candidate
) -> tuple[tuple[Path, ExportReport], ...]:
    """The exported files of a checkpoint, each with its folder; empty when it was not exported."""
    checkpoint = checkpoint_dir(store.runs / candidate.trial, candidate.step)
    folder = exports_dir(store, character, content_hash(checkpoint / "adapter.safetensors"))
    return tuple((folder, report) for report in read_exports(folder) or ())


def read_exports(folder: Path) -> tuple[ExportReport, ExportReport] | None:
    """The reports of an earlier export when its files are whole: kohya's, then diffusers'."""
    file = folder / EXPORTS_FILE
    if not file.exists():
        return None
    rows = json.loads(file.read_text("utf-8"))
    kohya, diffusers = (ExportReport(**row | {"path": folder / row["path"]}) for row in rows)
    for report in (kohya, diffusers):
        if not report.path.exists() or content_hash(report.path) != report.sha256:
            return None
    return kohya, diffusers


def write_exports(folder: Path, kohya: ExportReport, diffusers: ExportReport) -> None:
    """Keep the reports of two files that lie in the folder."""
    rows = [
        asdict(report) | {"path": report.path.relative_to(folder).as_posix()}
        for report in (kohya, diffusers)
    ]
    write_atomic(folder / EXPORTS_FILE, json.dumps(rows, indent=1).encode())

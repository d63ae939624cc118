"""A dataset version written as another trainer reads it: kohya, Hugging Face, ai-toolkit, a table.

A version in, a folder out that appears whole or not at all. The holdout is left out: it is for
scoring, and a trainer that saw it would score itself. Nobody's files are ever written over.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from captioning.errors import UserError
from captioning.kohya_toml import dataset_toml
from captioning.lexicon.names import without_weights
from captioning.rows import to_lines
from captioning.store import content_hash, sync_directory
from captioning.versions import DatasetVersion, Sample

ExportFormat = Literal["kohya", "imagefolder", "ai-toolkit", "csv"]
# Says which files an export wrote, so that the next one may replace them; hidden, because trainers
# and Hugging Face's loader pass over hidden files.
MARKER = ".lorafarm-export.json"
TRIGGER_SLOT = "[trigger]"  # ai-toolkit puts its config's trigger_word there
MAX_VIEWS = 10_000  # per picture; more is a mistyped number
SHOWN_FILES = 3  # foreign ones, in the refusal


@dataclass(frozen=True)
class RenderProfile:
    """How a trainer reads captions; all read one line, the trigger first."""

    weights: bool = False  # `(red eyes:1.3)` is emphasis to it, not eight literal tokens
    trigger: str | None = None  # what stands in the place of the trigger


PROFILES: dict[ExportFormat, RenderProfile] = {
    # sd-scripts reads weights with --weighted_captions; no other trainer here does.
    "kohya": RenderProfile(weights=True),
    "imagefolder": RenderProfile(),
    "ai-toolkit": RenderProfile(trigger=TRIGGER_SLOT),
    "csv": RenderProfile(),
}


def caption_for(profile: RenderProfile, caption: str, trigger: str) -> str:
    """The caption as the trainer of this profile reads it, on one line."""
    line = " ".join(caption.split())
    if not profile.weights:
        line = without_weights(line)
    if profile.trigger is not None:
        own = re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)")
        line = own.sub(lambda _: profile.trigger or "", line)
    return line


def export_version(
    version: DatasetVersion, to: Path, form: ExportFormat, views: int | None = None
) -> Path:
    """Write the version's training pictures and captions to the folder `to`; gives its path.

    `views` is how often kohya's trainer shows each picture in an epoch (`num_repeats`). Raises
    UserError when the folder holds anything that an earlier export did not write there.
    """
    if views is not None and form != "kohya":
        raise UserError("--views", f"{form} has no repeats", "leave it out, or export for kohya")
    if views is not None and not 1 <= views <= MAX_VIEWS:
        raise UserError("--views", f"{views}", f"give 1 to {MAX_VIEWS} views per picture")
    to = to.expanduser().resolve()
    _require_ours(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as temporary:
        building = Path(temporary) / "new"
        building.mkdir()
        if form == "kohya":
            _kohya(version, building, to, views or 1)
        else:
            _WRITERS[form](version, building)
        files = sorted(file for file in building.rglob("*") if file.is_file())
        hashes = {file.relative_to(building).as_posix(): content_hash(file) for file in files}
        marker = {"version": f"{version.character}/{version.name}", "format": form, "files": hashes}
        (building / MARKER).write_text(json.dumps(marker, indent=1) + "\n", "utf-8")
        if to.exists():
            to.rename(Path(temporary) / "old")
        building.rename(to)
    sync_directory(to.parent)
    return to


def _kohya(version: DatasetVersion, building: Path, to: Path, views: int) -> None:
    """images/0001.png + .txt and a dataset.toml that names the final folder."""
    _pictures_with_texts(version, building / "images", "kohya")
    sides = (min(sample.width, sample.height) for sample in version.train)
    text = dataset_toml(str(to / "images"), version.class_word, sides, views)
    (building / "dataset.toml").write_text(text, "utf-8")


def _imagefolder(version: DatasetVersion, building: Path) -> None:
    """train/0001.png and train/metadata.jsonl; beside the split folder it would not be read."""
    split = building / "train"
    rows = [
        {"file_name": _copied(sample, split).name, "text": _caption(version, sample, "imagefolder")}
        for sample in version.train
    ]
    (split / "metadata.jsonl").write_text(to_lines(rows), "utf-8")


def _ai_toolkit(version: DatasetVersion, building: Path) -> None:
    """0001.png + .txt in one folder."""
    _pictures_with_texts(version, building, "ai-toolkit")


def _csv(version: DatasetVersion, building: Path) -> None:
    """0001.png and metadata.csv, `file_name,text`."""
    buffer = io.StringIO(newline="")
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["file_name", "text"])
    for sample in version.train:
        table.writerow([_copied(sample, building).name, _caption(version, sample, "csv")])
    (building / "metadata.csv").write_text(buffer.getvalue(), "utf-8")


_WRITERS: dict[ExportFormat, Callable[[DatasetVersion, Path], None]] = {
    "imagefolder": _imagefolder,
    "ai-toolkit": _ai_toolkit,
    "csv": _csv,
}


def _pictures_with_texts(version: DatasetVersion, folder: Path, form: ExportFormat) -> None:
    for sample in version.train:
        picture = _copied(sample, folder)
        picture.with_suffix(".txt").write_text(_caption(version, sample, form), "utf-8")


def _copied(sample: Sample, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return Path(shutil.copyfile(sample.path, folder / sample.path.name))


def _caption(version: DatasetVersion, sample: Sample, form: ExportFormat) -> str:
    return caption_for(PROFILES[form], sample.caption, version.trigger)


def _require_ours(to: Path) -> None:
    """Refuse a folder with anything in it that no export wrote, or that was changed since."""
    if not to.exists():
        return
    if not to.is_dir():
        raise UserError(str(to), "a file is there", "give a folder with --to")
    files = {
        file.relative_to(to).as_posix(): file
        for file in to.rglob("*")
        if file.is_symlink() or file.is_file()
    }
    known: dict[str, str] = {}
    if MARKER in files:
        try:
            known = json.loads(files.pop(MARKER).read_text("utf-8"))["files"]
            foreign = [
                name for name, file in files.items() if known.get(name) != content_hash(file)
            ]
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            foreign = sorted(files)
    else:
        foreign = sorted(files)
    if foreign:
        shown = ", ".join(sorted(foreign)[:SHOWN_FILES])
        more = f" and {len(foreign) - SHOWN_FILES} more" if len(foreign) > SHOWN_FILES else ""
        raise UserError(
            str(to),
            f"files that no export wrote, or that were changed since: {shown}{more}",
            "give a new folder with --to, or move them away",
        )

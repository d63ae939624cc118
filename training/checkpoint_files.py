"""The checkpoint folders of a trial: their names, their manifests, and which of them are whole.

A trial's folder in, checkpoints out. A list is made from manifests and sizes of files, so that it
costs the same however large the files are. Whoever goes on from a checkpoint's bytes verifies their
hashes first. `training.checkpoints` writes and loads the tensors; nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

ADAPTER_FILE = "adapter.safetensors"
STATE_FILE = "state.safetensors"
RECIPE_FILE = "recipe.yaml"
MANIFEST_FILE = "manifest.json"
FORMAT = 1
# The manifest of a checkpoint says so when its optimiser state was deleted to save room.
STATE_DROPPED = "state_dropped"
# The manifest names the size of each file in bytes; older manifests do not.
SIZES = "sizes"
_STEP_FOLDER = re.compile(r"step-(\d{6,})")
# A safetensors file begins with the length of its JSON header, which this many bytes hold.
_LENGTH_BYTES = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there, in the sizes that they were saved in."""

    step: int
    path: Path
    has_state: bool = True  # training can go on from it


@dataclass(frozen=True)
class TornCheckpoint:
    """A checkpoint folder that cannot be used, and why."""

    path: Path
    reason: str


def checkpoint_dir(trial_dir: Path, step: int) -> Path:
    """The folder of a trial's checkpoint at a step: `trial_dir/step-000500`."""
    return trial_dir / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint folder's name says; ValueError if it is no such name."""
    matched = _STEP_FOLDER.fullmatch(path.name)
    if matched is None:
        raise ValueError(f"{path}: not a checkpoint folder (expected a name like step-000500)")
    return int(matched[1])


def step_folders(trial_dir: Path) -> dict[int, Path]:
    """The trial's checkpoint folders by rising step, whole or not; temporary ones are left out."""
    found = {}
    for folder in trial_dir.iterdir() if trial_dir.is_dir() else ():
        if _STEP_FOLDER.fullmatch(folder.name) and folder.is_dir():
            found[step_of(folder)] = folder
    return dict(sorted(found.items()))


def list_checkpoints(trial_dir: Path) -> list[Checkpoint]:
    """A trial's checkpoints by rising step; torn ones are logged and left out.

    A file that is missing, too short or too long makes a checkpoint torn. Damage that leaves the
    size as it was is found by `check_checkpoints`, `is_whole` and `load_checkpoint`.
    """
    whole = []
    for step, path in step_folders(trial_dir).items():
        try:
            whole.append(_checked_by_size(path, step))
        except (OSError, ValueError) as error:
            _tell_skipped(path, error)
    return whole


def check_checkpoints(trial_dir: Path) -> tuple[list[Checkpoint], list[TornCheckpoint]]:
    """A trial's checkpoint folders, verified by the hashes of all bytes: whole and torn ones."""
    whole, torn = [], []
    for step, path in step_folders(trial_dir).items():
        try:
            files = read_verified(path)
        except (OSError, ValueError) as error:
            torn.append(TornCheckpoint(path, str(error)))
        else:
            whole.append(Checkpoint(step, path, STATE_FILE in files))
    return whole, torn


def is_whole(checkpoint: Checkpoint) -> bool:
    """Whether every byte of a checkpoint is as it was saved; what is not is logged."""
    try:
        read_verified(checkpoint.path)
    except (OSError, ValueError) as error:
        _tell_skipped(checkpoint.path, error)
        return False
    return True


def last_with_state(trial_dir: Path) -> Checkpoint | None:
    """Where training goes on: the last whole checkpoint that has its state; None at the start.

    Its bytes are verified, and those of no earlier one.
    """
    with_state = (one for one in reversed(list_checkpoints(trial_dir)) if one.has_state)
    return next(filter(is_whole, with_state), None)


def begun_with(trial_dir: Path) -> int | None:
    """The samples per step that a trial was begun with; None if it has not, or does not say."""
    checkpoints = list_checkpoints(trial_dir)
    return samples_per_step_at(checkpoints[-1].path) if checkpoints else None


def samples_per_step_at(path: Path) -> int | None:
    """The samples, over all workers, of each step up to a checkpoint; None if it does not say."""
    found = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8")).get("samples_per_step")
    return None if found is None else int(found)


def read_verified(path: Path) -> dict[str, bytes]:
    """The bytes of a checkpoint's files; OSError or ValueError if one is not as it was saved."""
    manifest = _read_manifest(path, step_of(path))
    files = {}
    for name in _named_files(manifest):
        data = (path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest["files"].get(name):
            raise ValueError(f"{path / name}: its content does not match the manifest")
        files[name] = data
    return files


def saved_hashes(path: Path) -> dict[str, str]:
    """The hashes that a checkpoint's manifest names, by file; empty if it cannot be read."""
    try:
        return dict(_read_manifest(path, step_of(path))["files"])
    except (OSError, ValueError):
        return {}


def _checked_by_size(path: Path, step: int) -> Checkpoint:
    """The checkpoint in a folder; OSError or ValueError if a file is not of the size it was."""
    manifest = _read_manifest(path, step)
    names = _named_files(manifest)
    for name in names:
        size, saved = (path / name).stat().st_size, _saved_size(path / name, manifest)
        if size != saved:
            raise ValueError(f"{path / name}: has {size} bytes, and had {saved} when it was saved")
    return Checkpoint(step, path, STATE_FILE in names)


def _read_manifest(path: Path, step: int) -> dict[str, Any]:
    file = path / MANIFEST_FILE
    manifest = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file}: not a manifest of format {FORMAT}")
    if manifest.get("step") != step:
        raise ValueError(f"{file}: is of step {manifest.get('step')}")
    if not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{file}: names no files")
    if not isinstance(manifest.get(SIZES, {}), dict):
        raise ValueError(f"{file}: its sizes are no mapping")
    return manifest


def _named_files(manifest: dict[str, Any]) -> tuple[str, ...]:
    """The files that make up the checkpoint."""
    kept = (ADAPTER_FILE, RECIPE_FILE)
    return kept if manifest.get(STATE_DROPPED) is True else (*kept, STATE_FILE)


def _saved_size(file: Path, manifest: dict[str, Any]) -> object:
    """How many bytes a file had when it was saved.

    Older manifests name no sizes. A safetensors file tells its own, and the recipe is so small that
    its hash can be compared.
    """
    if SIZES in manifest:
        return manifest[SIZES].get(file.name)
    if file.suffix == ".safetensors":
        return _size_by_header(file)
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest["files"].get(file.name):
        raise ValueError(f"{file}: its content does not match the manifest")
    return len(data)


def _size_by_header(file: Path) -> int:
    """The size that a safetensors file's header asks for: that of the header and of all tensors."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file}: is shorter than its header")
        header = opened.read(length)
    try:
        return _LENGTH_BYTES + length + _tensors_size(header)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{file}: has no readable header") from error


@lru_cache(maxsize=16)
def _tensors_size(header: bytes) -> int:
    """How many bytes all tensors of a safetensors file take.

    The checkpoints of a sweep have few different headers, since their tensors have equal shapes.
    """
    tensors = [one for name, one in json.loads(header).items() if name != "__metadata__"]
    return max((one["data_offsets"][1] for one in tensors), default=0)


def _tell_skipped(path: Path, error: Exception) -> None:
    log.warning("checkpoint skipped: %s: %s", path, error)

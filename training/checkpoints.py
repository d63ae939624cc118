"""A trial at a step, on disk: adapter weights, optimiser state, recipe and a manifest of hashes.

Tensors and a recipe in, a folder `step-000500/` out that is there whole or not at all. A folder
that is torn all the same (a full disk, a damaged file) is recognised by its hashes and skipped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load, save
from torch import Tensor

from captioning import parse_config, sync_directory, write_atomic
from training.recipe import Recipe

ADAPTER_FILE = "adapter.safetensors"
STATE_FILE = "state.safetensors"
RECIPE_FILE = "recipe.yaml"
MANIFEST_FILE = "manifest.json"
# In the manifest of a checkpoint whose optimiser state was deleted to save room.
STATE_DROPPED = "state_dropped"
FORMAT = 1
_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_TEMPORARY = ".writing-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint."""

    step: int
    path: Path
    has_state: bool = True  # training can go on from it


@dataclass(frozen=True)
class TornCheckpoint:
    """A checkpoint folder that cannot be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds; tensors on the CPU, fp32 unless they are counters."""

    step: int
    recipe: Recipe
    adapter: dict[str, Tensor]  # as adapters.adapter_state gives it: what is scored and exported
    state: dict[str, Tensor]  # as pack.slot.Slot.optimizer_state gives it; empty if dropped
    step_samples: int | None = None  # of every step so far; None in checkpoints that do not say


@dataclass(frozen=True)
class Unpublished:
    """A checkpoint that is written and flushed, in a temporary folder that nobody reads."""

    temporary: Path
    target: Path
    step: int


def save_checkpoint(
    trial_dir: Path,
    step: int,
    recipe: Recipe,
    adapter: dict[str, Tensor],
    state: dict[str, Tensor],
    step_samples: int | None = None,
) -> Checkpoint:
    """Write `trial_dir/step-NNNNNN/` atomically; see `write_checkpoint` and `publish`."""
    contents = Contents(step, recipe, adapter, state, step_samples)
    return publish(write_checkpoint(trial_dir, contents))


def write_checkpoint(trial_dir: Path, contents: Contents) -> Unpublished:
    """All of a checkpoint but its name: `publish` it, or `remove_unfinished` will.

    `contents.step_samples`, of all workers, go into the manifest: who goes on keeps them. Raises
    OSError (a full disk) and leaves nothing.
    """
    target = trial_dir / f"step-{contents.step:06d}"
    temporary = trial_dir / f"{_TEMPORARY}{target.name}"
    recipe = contents.recipe.model_dump(mode="json")
    files = {
        ADAPTER_FILE: save(contents.adapter),
        STATE_FILE: save(contents.state),
        RECIPE_FILE: yaml.safe_dump(recipe, sort_keys=False).encode(),
    }
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": contents.step,
        "torch": torch.__version__,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    if contents.step_samples is not None:
        manifest["samples_per_step"] = contents.step_samples
    files[MANIFEST_FILE] = json.dumps(manifest, indent=1).encode()
    remove_unfinished(trial_dir)
    temporary.mkdir(parents=True)
    try:
        for name, data in files.items():
            with (temporary / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_directory(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Unpublished(temporary, target, contents.step)


def publish(written: Unpublished) -> Checkpoint:
    """Give a checkpoint its name, in place of a torn folder that has it.

    Raises OSError and leaves nothing.
    """
    try:
        if written.target.exists():
            shutil.rmtree(written.target)
        written.temporary.rename(written.target)
    except BaseException:
        shutil.rmtree(written.temporary, ignore_errors=True)
        raise
    sync_directory(written.target.parent)
    return Checkpoint(written.step, written.target)


def drop_state(checkpoint: Checkpoint) -> None:
    """Delete the optimiser state of a checkpoint, most of its size; its adapter stays whole.

    No training goes on from it any more. Does nothing the second time.
    """
    file = checkpoint.path / MANIFEST_FILE
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest["files"].pop(STATE_FILE, None)
    # First the word, then the deed: a kill in between leaves a file that nobody asks for.
    data = json.dumps({**manifest, STATE_DROPPED: True}, indent=1)
    write_atomic(file, data.encode())
    (checkpoint.path / STATE_FILE).unlink(missing_ok=True)


def last_with_state(trial_dir: Path) -> Checkpoint | None:
    """Where training goes on: the last whole checkpoint that has its state; None at the start."""
    found = [checkpoint for checkpoint in list_checkpoints(trial_dir) if checkpoint.has_state]
    return found[-1] if found else None


def remove_unfinished(trial_dir: Path) -> None:
    """Delete what a killed writer left; only one process writes a trial's checkpoints."""
    for leftover in trial_dir.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def list_checkpoints(trial_dir: Path) -> list[Checkpoint]:
    """The whole checkpoints of a trial by rising step; torn ones are logged and left out."""
    whole, torn = check_checkpoints(trial_dir)
    for checkpoint in torn:
        log.warning("checkpoint skipped: %s: %s", checkpoint.path, checkpoint.reason)
    return whole


def check_checkpoints(trial_dir: Path) -> tuple[list[Checkpoint], list[TornCheckpoint]]:
    """All checkpoint folders of a trial, verified by their hashes: the whole and the torn ones."""
    whole, torn = [], []
    for path in sorted(trial_dir.glob("step-*")):
        matched = _STEP_FOLDER.fullmatch(path.name)
        if matched is None or not path.is_dir():
            continue
        step = int(matched[1])
        try:
            files = _read_verified(path, step)
        except (OSError, ValueError) as error:
            torn.append(TornCheckpoint(path, str(error)))
        else:
            whole.append(Checkpoint(step, path, STATE_FILE in files))
    return sorted(whole, key=lambda checkpoint: checkpoint.step), torn


def load_checkpoint(path: Path) -> Contents:
    """Read a checkpoint folder. Raises OSError or ValueError naming the file if it is torn."""
    matched = _STEP_FOLDER.fullmatch(path.name)
    if matched is None:
        raise ValueError(f"{path}: not a checkpoint folder (expected a name like step-000500)")
    step = int(matched[1])
    files = _read_verified(path, step)
    source = str(path / RECIPE_FILE)
    data = yaml.safe_load(files[RECIPE_FILE])
    # Recipes that name no axis are from the time when there was one.
    data["network"].setdefault("dora_axis", "output")
    return Contents(
        step=step,
        recipe=parse_config(Recipe, data, source),
        adapter=load(files[ADAPTER_FILE]),
        state=load(files[STATE_FILE]) if STATE_FILE in files else {},
        step_samples=samples_per_step_at(path),
    )


def begun_with(trial_dir: Path) -> int | None:
    """The samples per step that a trial was begun with; None if it has not, or does not say."""
    checkpoints = list_checkpoints(trial_dir)
    return samples_per_step_at(checkpoints[-1].path) if checkpoints else None


def samples_per_step_at(path: Path) -> int | None:
    """The samples, of all workers, of the steps up to a checkpoint; None if it does not say."""
    found = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8")).get("samples_per_step")
    return None if found is None else int(found)


def _read_verified(path: Path, step: int) -> dict[str, bytes]:
    """The bytes of the checkpoint's files; OSError or ValueError if one is not as it was saved."""
    manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path / MANIFEST_FILE}: not a manifest of format {FORMAT}")
    if manifest.get("step") != step:
        raise ValueError(f"{path / MANIFEST_FILE}: is of step {manifest.get('step')}")
    hashes = manifest.get("files")
    if not isinstance(hashes, dict):
        raise ValueError(f"{path / MANIFEST_FILE}: names no files")
    files = {}
    kept = (ADAPTER_FILE, RECIPE_FILE)
    for name in kept if manifest.get(STATE_DROPPED) is True else (*kept, STATE_FILE):
        data = (path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != hashes.get(name):
            raise ValueError(f"{path / name}: its content does not match the manifest")
        files[name] = data
    return files

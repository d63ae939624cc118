"""Writes and loads a trial at a step: adapter weights, optimiser state, recipe, manifest.

Tensors and a recipe in, a folder `step-000500/` out that is there whole or not at all. A folder
that is torn all the same (a full disk, a damaged file) is recognised by its hashes and not loaded.
`training.checkpoint_files` lists the folders without loading anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load, save
from torch import Tensor

from captioning import parse_config, sync_directory, write_atomic
from training.checkpoint_files import (
    ADAPTER_FILE,
    FORMAT,
    MANIFEST_FILE,
    RECIPE_FILE,
    SIZES,
    STATE_DROPPED,
    STATE_FILE,
    Checkpoint,
    begun_with,
    check_checkpoints,
    checkpoint_dir,
    last_with_state,
    list_checkpoints,
    read_verified,
    samples_per_step_at,
    step_of,
)
from training.recipe import Recipe

# The listing functions are exported here as well, for callers that list and load.
__all__ = [
    "Checkpoint",
    "Contents",
    "Unpublished",
    "begun_with",
    "check_checkpoints",
    "drop_state",
    "last_with_state",
    "list_checkpoints",
    "load_checkpoint",
    "publish",
    "remove_unfinished",
    "samples_per_step_at",
    "save_checkpoint",
    "write_checkpoint",
]

_TEMPORARY = ".writing-"


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
    """Write a checkpoint into a temporary folder, which `publish` gives its name.

    What a killed writer leaves there, `remove_unfinished` deletes.

    `contents.step_samples`, of all workers, go into the manifest: who goes on keeps them. Raises
    OSError (a full disk) and leaves nothing.
    """
    target = checkpoint_dir(trial_dir, contents.step)
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
        SIZES: {name: len(data) for name, data in files.items()},
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
    manifest.get(SIZES, {}).pop(STATE_FILE, None)
    # The manifest is written first: a kill in between leaves a file that nobody asks for.
    data = json.dumps({**manifest, STATE_DROPPED: True}, indent=1)
    write_atomic(file, data.encode())
    (checkpoint.path / STATE_FILE).unlink(missing_ok=True)


def remove_unfinished(trial_dir: Path) -> None:
    """Delete what a killed writer left; only one process writes a trial's checkpoints."""
    for leftover in trial_dir.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def load_checkpoint(path: Path) -> Contents:
    """Read a checkpoint folder. Raises OSError or ValueError naming the file if it is torn."""
    step = step_of(path)
    files = read_verified(path)
    source = str(path / RECIPE_FILE)
    data = yaml.safe_load(files[RECIPE_FILE])
    # Older recipes name no axis, because `output` was the only one.
    data["network"].setdefault("dora_axis", "output")
    return Contents(
        step=step,
        recipe=parse_config(Recipe, data, source),
        adapter=load(files[ADAPTER_FILE]),
        state=load(files[STATE_FILE]) if STATE_FILE in files else {},
        step_samples=samples_per_step_at(path),
    )

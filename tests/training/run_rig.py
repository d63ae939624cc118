"""Jobs for a worker group on the tiny base, and the same trials trained in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from captioning import DatasetVersion
from training.data.latents import encode_dataset
from training.families import load_base
from training.loop import Callbacks, train_pack
from training.pack.slot import Trial
from training.recipe import Recipe
from training.run.job import SweepJob, TrialSpec


def recipe(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": {"rank": 4},
        "optimizer": {"lr": 1e-3},
        "steps": 6,
        "checkpoint_every": 2,
        "batch_size": 2,
        "seed": 9,
    }
    return Recipe.model_validate({**data, **changes})


def make_job(base: Path, dataset: DatasetVersion, folder: Path, *recipes: Recipe) -> SweepJob:
    return SweepJob(
        base=str(base),
        dataset_path=str(dataset.path),
        latents_dir=str(folder / "latents"),
        trials=tuple(
            TrialSpec(f"t{i}", recipe, folder / f"runs/t{i}") for i, recipe in enumerate(recipes)
        ),
        scoring=None,
        score_dir=str(folder / "base"),
    )


def train_here(base: Path, dataset: DatasetVersion, folder: Path, *recipes: Recipe) -> list[Path]:
    """The same trials as one pack in this process with one thread, without Ray."""
    torch.set_num_threads(1)
    loaded = load_base(base)
    cache = encode_dataset(dataset, loaded, None, False, folder / "latents-here")
    trials = [Trial(folder / f"here/t{i}", recipe, cache) for i, recipe in enumerate(recipes)]

    def fail(trial: Trial, error: Exception) -> None:
        raise AssertionError(trial.id) from error

    train_pack(loaded, trials, Callbacks(fail))
    return [trial.trial_dir for trial in trials]

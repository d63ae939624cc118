"""Trials that are trained in packs and alone, stopped and gone on with, and then compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_trials import losses, rows, steps_saved

from training.checkpoints import list_checkpoints, load_checkpoint
from training.data.latents import LatentCache
from training.events import Event, StepTaken
from training.families import Base
from training.loop import train
from training.pack.slot import Trial
from training.recipe import Recipe

TOLERANCE = 1e-5
STATE_TOLERANCE = 1e-3  # squares of gradients, whose rounding the weights hardly show
# With Adam's usual 1e-8 a gradient of pure rounding noise would move a weight by a whole step.
EPS = 1e-4


def small(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": {"rank": 4},
        "optimizer": {"lr": 1e-3, "eps": EPS},
        "steps": 4,
        "checkpoint_every": 2,
        "batch_size": 2,
    }
    return Recipe.model_validate({**data, **changes})


def fail(trial: Trial, error: Exception) -> None:
    raise AssertionError(f"{trial.id} failed") from error


def trials(folder: Path, recipes: list[Recipe], caches: list[LatentCache]) -> list[Trial]:
    return [
        Trial(folder / f"t{number}", recipe, cache)
        for number, (recipe, cache) in enumerate(zip(recipes, caches, strict=True))
    ]


def assert_same_training(packed: Path, solo: Path) -> None:
    """Equal curves, and equal weights and moments at every checkpoint."""
    assert losses(packed) == pytest.approx(losses(solo), rel=TOLERANCE)
    norms = [[row["grad_norm"] for row in rows(folder)] for folder in (packed, solo)]
    assert norms[0] == pytest.approx(norms[1], rel=10 * TOLERANCE)
    assert steps_saved(packed) == steps_saved(solo)
    for one, other in zip(list_checkpoints(packed), list_checkpoints(solo), strict=True):
        found, wanted = load_checkpoint(one.path), load_checkpoint(other.path)
        assert found.recipe == wanted.recipe
        assert found.adapter.keys() == wanted.adapter.keys()
        assert found.state.keys() == wanted.state.keys()
        for name, tensor in wanted.adapter.items():
            error = float((found.adapter[name] - tensor).abs().max())
            assert error <= TOLERANCE * float(tensor.abs().max()), name
        for name, tensor in wanted.state.items():
            error = float((found.state[name] - tensor).abs().max())
            assert error <= STATE_TOLERANCE * float(tensor.abs().max()), name


def assert_bit_equal(found: list[Trial], wanted: list[Trial]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert losses(one.trial_dir) == losses(other.trial_dir)
        assert steps_saved(one.trial_dir) == steps_saved(other.trial_dir)
        for step in steps_saved(other.trial_dir):
            for name in ("adapter.safetensors", "state.safetensors", "manifest.json"):
                file = f"step-{step:06d}/{name}"
                assert (one.trial_dir / file).read_bytes() == (other.trial_dir / file).read_bytes()


def run_with_interruptions(
    base: Base, cache: LatentCache, recipe: Recipe, trial_dir: Path, stops: list[int]
) -> None:
    for stop_after in stops:
        done: list[Event] = []
        train(
            base,
            cache,
            recipe,
            trial_dir,
            on_event=lambda event, done=done: isinstance(event, StepTaken) and done.append(event),
            stop=lambda done=done, stop_after=stop_after: len(done) + 1 >= stop_after,
        )
    train(base, cache, recipe, trial_dir)


def poison(base: Base, step: int, monkeypatch: pytest.MonkeyPatch, gradient: bool) -> None:
    """Make the gradient, or the loss, of the given call of the UNet infinite."""
    calls = 0
    predict = base.predict

    def poisoned(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        output = predict(*arguments)
        if calls != step:
            return output
        if not gradient:
            return output * math.inf
        output.register_hook(lambda grad: grad * math.inf)
        return output

    monkeypatch.setattr(base, "predict", poisoned)

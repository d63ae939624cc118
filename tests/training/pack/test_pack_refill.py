"""Slots that become free are taken by those that wait, and nobody else notices."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pack import EPS, assert_same_training

from training.checkpoints import list_checkpoints, load_checkpoint
from training.data.latents import LatentCache
from training.families import Base
from training.loop import Callbacks, TrainingDiverged, train, train_pack
from training.pack.adapters import detach
from training.pack.pack import Pack, TrialState, form_pack, last_contents
from training.pack.slot import Trial
from training.recipe import Recipe


def recipe(seed: int, **changes: Any) -> Recipe:
    options = {
        "network": {"rank": 4},
        "optimizer": {"lr": 1e-3, "eps": EPS},
        "checkpoint_every": 100,
        "batch_size": 2,
        "seed": seed,
    }
    return Recipe.model_validate({**options, **changes})


def pack_of(folder: Path, recipes: list[Recipe], cache: LatentCache) -> list[Trial]:
    return [Trial(folder / f"t{number}", one, cache) for number, one in enumerate(recipes)]


def rows(trial: Trial) -> list[dict[str, Any]]:
    lines = (trial.trial_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def adapter(trial_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(trial_dir)[-1].path).adapter


def fail(trial: Trial, error: Exception) -> None:
    raise AssertionError(trial.id) from error


def test_trials_that_wait_take_free_seats_and_end_as_if_alone(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    dora, wide = {"rank": 2, "method": "dora"}, {"rank": 8}
    recipes = [
        recipe(0, steps=2),
        recipe(1, steps=5, network=dora, ema_decay=0.9),
        recipe(2, steps=2, network=wide, optimizer={"type": "lion", "lr": 1e-3}),
        recipe(3, steps=4, network={**dora, "dora_axis": "output"}),
        recipe(4, steps=1, optimizer={"lr": 1e-3, "eps": 1e-3}),
    ]
    trials = pack_of(tmp_path / "pack", recipes, tiny_cache)
    done = train_pack(tiny_base, trials, Callbacks(fail), trials_per_pack=2)
    assert done == {trial.id: trial.recipe.steps for trial in trials}
    # Two slots: 0 with 1, then 2 with 1, then 3 with 1 for a step, then 3 with 4, then 3 alone.
    assert [[row["pack"] for row in rows(trial)] for trial in trials] == [
        [2, 2],
        [2, 2, 2, 2, 2],
        [2, 2],
        [2, 2, 1, 1],
        [2],
    ]
    for trial in trials:
        train(tiny_base, tiny_cache, trial.recipe, tmp_path / "solo" / trial.id)
        assert_same_training(trial.trial_dir, tmp_path / "solo" / trial.id)


def test_those_who_stay_keep_their_very_numbers(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    recipes = [recipe(0), recipe(1, network={"rank": 8, "method": "dora"}, ema_decay=0.9)]
    trials = pack_of(tmp_path, [*recipes, recipe(2, network={"rank": 16})], tiny_cache)
    train_pack(tiny_base, trials[:2], Callbacks(fail, stop=lambda: True))
    states = [TrialState(trial, last_contents(tiny_base, trial)) for trial in trials]
    first = form_pack(tiny_base, states[:2], scaled=False)
    before = first.slots[1].contents()
    left = first.states_without(first.slots[:1])
    detach(tiny_base)
    second = form_pack(tiny_base, [*left, states[2]], scaled=False)
    assert [slot.trial.id for slot in second.slots] == ["t1", "t2"]
    after = second.slots[0].contents()
    for found, wanted in ((after.adapter, before.adapter), (after.state, before.state)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    detach(tiny_base)


def test_a_pack_is_gone_before_the_next_one_needs_the_room(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[list[bool]] = []
    banks: list[weakref.ref[Any]] = []

    def watched(*arguments: Any) -> Pack:
        alive.append([bank() is not None for bank in banks])
        pack = form_pack(*arguments)
        banks.append(weakref.ref(pack.bank))
        return pack

    monkeypatch.setattr("training.loop.form_pack", watched)
    gc.disable()  # reference counts must do
    try:
        trials = pack_of(tmp_path, [recipe(seed, steps=2 + seed) for seed in range(3)], tiny_cache)
        train_pack(tiny_base, trials, Callbacks(fail, on_event=lambda _: None), trials_per_pack=2)
    finally:
        gc.enable()
    assert alive == [[], [False], [False, False]]


def test_the_seat_of_a_trial_that_fails_goes_to_the_next(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = pack_of(tmp_path, [recipe(seed, steps=3) for seed in range(3)], tiny_cache)
    predict, calls, failed = tiny_base.predict, [], []

    def poisoned(*arguments: Any) -> torch.Tensor:
        output = predict(*arguments)
        calls.append(len(output))
        if len(calls) == 2:
            output = output.clone()
            output[:2] = torch.nan  # the rows of the first trial
        return output

    monkeypatch.setattr(tiny_base, "predict", poisoned)
    done = train_pack(
        tiny_base,
        trials,
        Callbacks(lambda trial, error: failed.append((trial.id, error))),
        trials_per_pack=2,
    )
    assert [(name, type(error)) for name, error in failed] == [("t0", TrainingDiverged)]
    assert done == {"t1": 3, "t2": 3}
    assert calls == [4, 4, 4, 2, 2]


def test_an_interrupted_row_of_trials_goes_on(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    recipes = [
        recipe(seed, steps=steps, checkpoint_every=1) for seed, steps in enumerate((1, 3, 2))
    ]
    trials = pack_of(tmp_path / "broken", recipes, tiny_cache)
    asked = iter([False, True])
    done = train_pack(
        tiny_base, trials, Callbacks(fail, stop=lambda: next(asked)), trials_per_pack=2
    )
    assert done == {"t0": 1, "t1": 2, "t2": 1}
    done = train_pack(tiny_base, trials, Callbacks(fail), trials_per_pack=2)
    assert done == {"t0": 1, "t1": 3, "t2": 2}
    whole = pack_of(tmp_path / "whole", recipes, tiny_cache)
    train_pack(tiny_base, whole, Callbacks(fail), trials_per_pack=2)
    for broken, unbroken in zip(trials, whole, strict=True):
        found, wanted = adapter(broken.trial_dir), adapter(unbroken.trial_dir)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

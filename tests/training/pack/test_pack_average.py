"""An adapter's moving average: its formula, seen and saved, and never in training's way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import last_adapter, losses, run_with_interruptions
from test_pack import assert_same_training, fail, trials

from training.checkpoints import Contents, list_checkpoints, load_checkpoint
from training.data.latents import LatentCache
from training.families import Base
from training.loop import Callbacks, train, train_pack
from training.pack.adapters import detach
from training.pack.pack import TrialState, form_pack
from training.pack.slot import Trial
from training.recipe import Recipe

DECAY = 0.3  # reached after the fourth step: 4/13 is more


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def small(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": {"rank": 4, "method": "dora"},
        "optimizer": {"lr": 1e-2, "eps": 1e-4},
        "steps": 6,
        "checkpoint_every": 1,
        "ema_decay": DECAY,
        "seed": 3,
    }
    return Recipe.model_validate({**data, **changes})


def saved(trial_dir: Path) -> list[Contents]:
    return [load_checkpoint(checkpoint.path) for checkpoint in list_checkpoints(trial_dir)]


def test_the_average_is_the_sum_of_its_formula_and_training_the_same(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    train(tiny_base, tiny_cache, small(), tmp_path / "with")
    train(tiny_base, tiny_cache, small(ema_decay=None), tmp_path / "without")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    averaged, plain = saved(tmp_path / "with"), saved(tmp_path / "without")
    for name in plain[0].adapter:
        average = plain[0].adapter[name].double()
        for step, (found, trained) in enumerate(zip(averaged, plain, strict=True)):
            decay = min(DECAY, (1 + step) / (10 + step)) if step else 0.0
            average = decay * average + (1 - decay) * trained.adapter[name].double()
            assert torch.equal(found.state[f"trained/{name}"], trained.adapter[name])
            torch.testing.assert_close(found.adapter[name].double(), average, rtol=1e-5, atol=1e-7)
    assert any(
        not torch.equal(averaged[-1].adapter[n], plain[-1].adapter[n]) for n in plain[0].adapter
    )


def test_an_interrupted_run_equals_an_unbroken_one_bit_for_bit(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    recipe = small(steps=9, checkpoint_every=3, ema_decay=0.99)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(tiny_base, tiny_cache, recipe, whole)
    run_with_interruptions(tiny_base, tiny_cache, recipe, broken, [2, 4, 3])
    assert losses(broken) == losses(whole)
    for step in (3, 6, 9):
        for name in ("adapter.safetensors", "state.safetensors", "manifest.json"):
            file = f"step-{step:06d}/{name}"
            assert (broken / file).read_bytes() == (whole / file).read_bytes(), file


def test_in_company_every_average_is_that_of_the_solo_run_and_is_what_is_scored(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([500]), {"text": torch.ones(1, 77, 32)}
    seen: dict[Path, torch.Tensor] = {}

    def look(trial: Trial, step: int, path: Path) -> None:
        with torch.no_grad():
            seen[path] = tiny_base.predict(*inputs)

    lion = {"type": "lion", "lr": 3e-3}
    recipes = [
        small(steps=4, checkpoint_every=2),
        small(steps=4, checkpoint_every=2, ema_decay=0.9, network={"rank": 2}, optimizer=lion),
        small(steps=2, checkpoint_every=2, ema_decay=None),  # it leaves, the others sit anew
    ]
    packed = trials(tmp_path / "packed", recipes, [tiny_cache] * 3)
    train_pack(tiny_base, packed, Callbacks(fail, on_checkpoint=look))
    for trial in packed:
        train(tiny_base, tiny_cache, trial.recipe, tmp_path / "solo" / trial.id)
        assert_same_training(trial.trial_dir, tmp_path / "solo" / trial.id)
    assert len(seen) == 5
    for path, output in seen.items():
        contents = load_checkpoint(path)
        bare = Contents(contents.step, contents.recipe, contents.adapter, {})
        trial = Trial(path.parent, contents.recipe, tiny_cache)
        form_pack(tiny_base, [TrialState(trial, bare)], scaled=False)
        with torch.no_grad():
            wanted = tiny_base.predict(*inputs)
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
        detach(tiny_base)
    raw = {n.removeprefix("trained/"): t for n, t in saved(packed[0].trial_dir)[-1].state.items()}
    assert any(not torch.allclose(raw[n], t) for n, t in last_adapter(packed[0].trial_dir).items())

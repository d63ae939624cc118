"""Packs whose slots stand at buckets of different shapes: each trial as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pack import EPS, assert_same_training, fail, losses, rows, small, trials

from training.checkpoints import list_checkpoints, load_checkpoint
from training.data.batches import bucket_of_step
from training.data.latents import LatentCache
from training.families import Base
from training.loop import Callbacks, train, train_pack
from training.recipe import Recipe

MakeCache = Callable[..., LatentCache]
SHAPES = {(8, 8): 3, (4, 12): 2, (10, 6): 1}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def bucketed(**changes: Any) -> Recipe:
    return small(aspect_buckets=True, bucket_step_px=8, **changes)


def adapter(trial_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(trial_dir)[-1].path).adapter


def shapes_asked(base: Base, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """(samples, height, width) of every forward pass from here on."""
    asked: list[tuple[int, ...]] = []
    predict = base.predict

    def watched(latents: torch.Tensor, *others: Any) -> torch.Tensor:
        asked.append((len(latents), *latents.shape[-2:]))
        return predict(latents, *others)

    monkeypatch.setattr(base, "predict", watched)
    return asked


# With a small eps a gradient of little more than rounding noise would move a weight; those of
# convolutions are the smallest.
@pytest.mark.parametrize(("targets", "eps"), [("attention", EPS), ("attention+ff+conv", 1e-2)])
def test_slots_of_different_shapes_equal_their_solo_runs(
    tiny_base: Base,
    make_cache: MakeCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    targets: str,
    eps: float,
) -> None:
    """Own datasets: of four slots three are of one shape, with another one between them."""
    dora = {"rank": 2, "method": "dora"}
    differing: list[dict[str, Any]] = [
        {"network": {"rank": 4}},
        {"network": {**dora, "dora_axis": "output"}, "masked_loss": 0.1},
        {"network": {**dora, "dora_axis": "input"}, "huber_c": 0.2},
        {"network": {"rank": 2, "init": "pissa"}},
    ]
    recipes = [
        bucketed(
            **one | {"network": {**one["network"], "targets": targets}},
            seed=seed,
            optimizer={"lr": 1e-3, "eps": eps},
        )
        for seed, one in enumerate(differing)
    ]
    wide, mixed = {(4, 12): 3}, {(4, 12): 2, (8, 8): 1}
    caches = [
        make_cache(tiny_base, seed=number, buckets=buckets)
        for number, buckets in enumerate((wide, {(10, 6): 2}, mixed, wide))
    ]
    asked = shapes_asked(tiny_base, monkeypatch)
    packed = trials(tmp_path / "packed", recipes, caches)
    train_pack(tiny_base, packed, Callbacks(fail))
    third = [((4, 12), (8, 8))[bucket_of_step((2, 1), step)[0]] for step in range(4)]
    assert set(third) == {(4, 12), (8, 8)}
    assert asked == [
        shape
        for own in third
        for shape in (
            [(6, 4, 12), (2, 10, 6)] if own == (4, 12) else [(4, 4, 12), (2, 10, 6), (2, 8, 8)]
        )
    ]
    for trial in packed:
        train(tiny_base, trial.cache, trial.recipe, tmp_path / "solo" / trial.id)
        assert_same_training(trial.trial_dir, tmp_path / "solo" / trial.id)


def test_trials_on_one_dataset_share_every_forward_pass_until_a_seat_is_taken_later(
    tiny_base: Base, make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tiny_base, buckets=SHAPES)
    recipes = [
        bucketed(seed=1, steps=2),
        bucketed(seed=2, steps=5, network={"rank": 2, "method": "dora"}),
        bucketed(seed=3, steps=3, network={"rank": 8}),
    ]
    asked = shapes_asked(tiny_base, monkeypatch)
    packed = trials(tmp_path / "packed", recipes, [cache] * 3)
    train_pack(tiny_base, packed, Callbacks(fail), trials_per_pack=2)
    shapes = [list(SHAPES)[bucket_of_step((3, 2, 1), step)[0]] for step in range(5)]
    # The second at steps 2, 3 and 4 beside the third at 0, 1 and 2, which is not always the same.
    together = [[shapes[0]], [shapes[1]]]
    pairs = zip(shapes[2:], shapes[:3], strict=True)
    together += [[one] if one == other else [one, other] for one, other in pairs]
    assert asked == [(4 // len(own), *shape) for own in together for shape in own]
    assert any(len(own) == 2 for own in together)
    for trial in packed:
        train(tiny_base, cache, trial.recipe, tmp_path / "solo" / trial.id)
        assert_same_training(trial.trial_dir, tmp_path / "solo" / trial.id)


def test_accumulation_equals_the_large_batch(
    tiny_base: Base, make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache(tiny_base, buckets=SHAPES)
    for name, batch in (("large", 4), ("split", 1)):
        recipe = bucketed(batch_size=batch, accumulation=4 // batch, steps=6)
        train(tiny_base, cache, recipe, tmp_path / name)
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "large"), rel=1e-5)
    split = adapter(tmp_path / "split")
    for name, tensor in adapter(tmp_path / "large").items():
        torch.testing.assert_close(split[name], tensor, rtol=1e-4, atol=2e-6)


def test_an_interrupted_pack_equals_an_unbroken_one_bit_for_bit(
    tiny_base: Base, make_cache: MakeCache, tmp_path: Path
) -> None:
    recipes = [
        bucketed(seed=1, steps=6),
        bucketed(seed=2, steps=6, network={"rank": 2, "method": "dora"}),
    ]
    caches = [make_cache(tiny_base, buckets=SHAPES), make_cache(tiny_base, buckets={(8, 8): 4})]
    whole, broken = (trials(tmp_path / name, recipes, caches) for name in ("whole", "broken"))
    train_pack(tiny_base, whole, Callbacks(fail))
    for stop_after in (1, 3):
        asked: list[int] = []
        train_pack(
            tiny_base,
            broken,
            Callbacks(
                fail,
                stop=lambda asked=asked, last=stop_after: asked.append(1) or len(asked) >= last,
            ),
        )
    train_pack(tiny_base, broken, Callbacks(fail))
    for one, other in zip(broken, whole, strict=True):
        assert losses(one.trial_dir) == losses(other.trial_dir)
        for name in ("adapter.safetensors", "state.safetensors"):
            file = f"step-000006/{name}"
            assert (one.trial_dir / file).read_bytes() == (other.trial_dir / file).read_bytes()


def test_memory_that_runs_out_in_the_second_shape_of_a_step_changes_nothing(
    tiny_base: Base, make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three slots the first and the last have added up gradients when the second lacks room."""
    wide, tall = (make_cache(tiny_base, buckets={shape: 3}) for shape in ((4, 12), (12, 4)))
    recipes = [bucketed(seed=seed, steps=2) for seed in range(3)]
    caches = [wide, tall, wide]
    roomy = trials(tmp_path / "roomy", recipes, caches)
    train_pack(tiny_base, roomy, Callbacks(fail))
    predict = tiny_base.predict

    def limited(latents: torch.Tensor, *others: Any) -> torch.Tensor:
        if latents.shape[-2] == 12 and len(latents) > 1:
            raise torch.OutOfMemoryError("no room")
        return predict(latents, *others)

    monkeypatch.setattr(tiny_base, "predict", limited)
    tight = trials(tmp_path / "tight", recipes, caches)
    train_pack(tiny_base, tight, Callbacks(fail))
    for one, other in zip(tight, roomy, strict=True):
        assert [row["pack"] for row in rows(one.trial_dir)] == [3, 3]
        assert_same_training(one.trial_dir, other.trial_dir)

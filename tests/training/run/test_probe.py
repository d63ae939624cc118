"""Probes: the time of the training that they stand for, its memory, and what does not fit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from training.data.latents import LatentCache
from training.families import Base
from training.families.stable_diffusion import StableDiffusionBase
from training.loop import Callbacks, train_pack
from training.pack.slot import Trial
from training.recipe import Recipe
from training.run.probe import ProbeRequest, measure_pack, probe_pack, random_cache


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def recipe(**changes: Any) -> Recipe:
    data: dict[str, Any] = {"network": {"rank": 4}, "batch_size": 4, "steps": 40}
    return Recipe.model_validate({**data, **changes})


def request(base: Path, *recipes: Recipe, **changes: Any) -> ProbeRequest:
    return ProbeRequest(str(base), recipes, use_gpu=False, threads=1, **changes)


def test_the_time_of_a_step_is_that_of_the_training(
    tiny_base: Base, tiny_base_path: Path, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    recipes = [recipe(), recipe(network={"rank": 2, "method": "dora"}, seed=1)]
    measured = measure_pack(request(tiny_base_path, *recipes))
    assert measured is not None
    trials = [Trial(tmp_path / f"t{k}", recipes[k], tiny_cache) for k in range(2)]
    started = time.perf_counter()
    train_pack(tiny_base, trials, Callbacks(lambda *a: pytest.fail(str(a))))
    taken = time.perf_counter() - started
    assert taken / 3 < 40 * measured.step_s < 3 * taken


def test_a_probe_has_the_shapes_of_the_recipe(tiny_base: Base) -> None:
    cache = random_cache(tiny_base, recipe(resolution=32, flip=True))
    (bucket,) = cache.buckets
    assert bucket.mean.shape == bucket.logvar.shape == (1, 2, 4, 4, 4)
    assert cache.text["text"].shape == (1, 1, 77, 32)
    assert torch.equal(cache.empty_text["text"], cache.text["text"][0, 0])


def test_a_probe_with_buckets_is_of_the_largest(tiny_base: Base) -> None:
    cache = random_cache(tiny_base, recipe(aspect_buckets=True, bucket_step_px=24))
    # It is the largest of 24 × 72, 24 × 96, 48 × 48, 48 × 72 and their turns, in cells of 8 px.
    assert cache.buckets[0].mean.shape == (1, 1, 4, 9, 6)


@pytest.mark.parametrize("network", [{"rank": 4}, {"rank": 4, "text_encoder": {"rank": 2}}])
def test_a_recipe_of_one_step_is_measured_too(
    tiny_base_path: Path, network: dict[str, Any]
) -> None:
    one = recipe(steps=1, checkpoint_every=1, network=network, prior_weight=1.0)
    measured = measure_pack(request(tiny_base_path, one))
    assert measured is not None
    assert measured.step_s > 0


@pytest.mark.parametrize("most", [1, 2, 4])
def test_what_runs_out_of_memory_does_not_fit(
    tiny_base_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    predict = StableDiffusionBase.predict

    def limited(base: Any, latents: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if len(latents) > most:
            raise torch.OutOfMemoryError("no room")
        return predict(base, latents, *arguments)

    monkeypatch.setattr(StableDiffusionBase, "predict", limited)
    # With room for 2 the loop would go on in halves of 4, but halves were not asked about.
    assert (measure_pack(request(tiny_base_path, recipe())) is not None) == (most == 4)


@pytest.mark.slow
def test_the_memory_is_the_pack_s_own(tiny_base_path: Path) -> None:
    ballast = torch.ones(200_000_000)  # 800 MB of this process, which the probe does not have
    measured = probe_pack(request(tiny_base_path, recipe()))
    assert measured is not None
    assert 100_000_000 < measured.peak_bytes < ballast.nbytes

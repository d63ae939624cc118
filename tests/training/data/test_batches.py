"""Draws depend on (seed, step, place) alone, and every picture comes once per epoch."""

import collections
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.batches import draw_batch, places_of, shared_out
from training.data.latents import Bucket, LatentCache
from training.data.views import samples_per_step
from training.families import Base
from training.objective import Diffusion
from training.recipe import Recipe

OBJECTIVE = Diffusion("epsilon", DDPMScheduler().alphas_cumprod)


@given(batch=st.integers(1, 8), accumulation=st.integers(1, 8), world=st.integers(1, 8))
def test_places_are_shared_out_without_gap_or_overlap(
    batch: int, accumulation: int, world: int
) -> None:
    recipe = Recipe(batch_size=batch, accumulation=accumulation)
    places = [
        place
        for micro_step in range(accumulation)
        for rank in range(world)
        for place in places_of(recipe, micro_step, rank, world)
    ]
    assert places == list(range(samples_per_step(recipe, world)))


@given(
    batch=st.integers(1, 8),
    accumulation=st.integers(1, 8),
    begun=st.integers(1, 8),
    world=st.integers(1, 8),
)
def test_another_number_of_workers_trains_the_same_places(
    batch: int, accumulation: int, begun: int, world: int
) -> None:
    recipe = Recipe(batch_size=batch, accumulation=accumulation)
    samples = samples_per_step(recipe, begun)
    split = shared_out(recipe, samples, world)
    assert split.batch_size <= batch
    places = [
        place
        for micro_step in range(split.accumulation)
        for rank in range(world)
        for place in places_of(split, micro_step, rank, world)
    ]
    assert places[:samples] == list(range(samples))
    # What is left over is whole micro-batches, fewer than one for each worker.
    assert (len(places) - samples) % split.batch_size == 0
    assert len(places) - samples < world * split.batch_size
    if world == begun:
        assert split == recipe


def test_splitting_a_step_changes_no_draw(
    tiny_base: Base, make_cache: Callable[..., LatentCache]
) -> None:
    cache = make_cache(tiny_base, views=2)
    recipe = Recipe(seed=7, caption_dropout=0.5)
    whole = draw_batch(recipe, cache, 3, range(8), 8, OBJECTIVE)
    backwards = reversed(range(8))
    parts = [draw_batch(recipe, cache, 3, [place], 8, OBJECTIVE) for place in backwards][::-1]
    assert whole.images == tuple(part.images[0] for part in parts)
    for name in ("posterior_samples", "noise", "timesteps"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(whole, name), joined)
    texts = [part.conditions["text"] for part in parts]
    assert torch.equal(whole.conditions["text"], torch.cat(texts))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**63 - 1), step_samples=st.integers(1, 7))
def test_every_epoch_shows_every_picture_once(seed: int, step_samples: int) -> None:
    cache = _small_cache()
    recipe = Recipe(seed=seed)
    (count,) = cache.counts
    seen = [
        image
        for step in range(3 * count)
        for image in draw_batch(
            recipe, cache, step, range(step_samples), step_samples, OBJECTIVE
        ).images
    ]
    for epoch in range(len(seen) // count):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_the_draws_have_the_right_distribution(
    tiny_base: Base, make_cache: Callable[..., LatentCache]
) -> None:
    cache = make_cache(tiny_base, views=2)
    recipe = Recipe(caption_dropout=0.25)
    batch = draw_batch(recipe, cache, 0, range(4000), 4000, OBJECTIVE)
    assert abs(float(batch.noise.mean())) < 0.01
    assert abs(float(batch.noise.std()) - 1) < 0.01
    assert abs(float(batch.timesteps.float().mean()) - 499.5) < 15
    assert int(batch.timesteps.min()) >= 0
    assert int(batch.timesteps.max()) <= 999
    dropped = (batch.conditions["text"] == cache.empty_text["text"]).flatten(1).all(1)
    assert abs(float(dropped.float().mean()) - 0.25) < 0.03
    views = cache.buckets[0].mean[list(batch.images)]  # (B, 2, C, h, w)
    distances = (views - batch.posterior_samples[:, None]).square().flatten(2).mean(2)  # (B, 2)
    mirrored = distances.argmin(1)
    assert abs(float(mirrored.float().mean()) - 0.5) < 0.03
    spread = float(distances.min(1).values.mean())  # variance of the posterior, exp(-4)
    assert abs(spread - 0.0183) < 0.001
    # Two slots of one image get different noise.
    image = collections.Counter(batch.images).most_common(1)[0][0]
    one, other = [place for place, seen in enumerate(batch.images) if seen == image][:2]
    assert not torch.equal(batch.noise[one], batch.noise[other])


def test_an_offset_moves_whole_channels_and_no_other_draw(
    tiny_base: Base, make_cache: Callable[..., LatentCache]
) -> None:
    cache = make_cache(tiny_base)
    plain = draw_batch(Recipe(), cache, 0, range(2000), 2000, OBJECTIVE)
    offset = draw_batch(Recipe(noise_offset=0.5), cache, 0, range(2000), 2000, OBJECTIVE)
    moved = offset.noise - plain.noise  # (B, C, h, w)
    assert float(moved.flatten(2).std(2).max()) < 1e-6
    sizes = moved[:, :, 0, 0]
    assert abs(float(sizes.mean())) < 0.02 and abs(float(sizes.std()) - 0.5) < 0.02
    for name in ("posterior_samples", "timesteps"):
        assert torch.equal(getattr(plain, name), getattr(offset, name))
    assert torch.equal(plain.conditions["text"], offset.conditions["text"])


def _small_cache() -> LatentCache:
    shape = (5, 1, 1, 1, 1)
    text = {"text": torch.zeros(5, 1, 1, 1)}
    empty = {"text": torch.zeros(1, 1)}
    zeros, ones = torch.zeros(shape), torch.ones(shape)
    bucket = Bucket(tuple(range(5)), zeros, zeros, ones)
    return LatentCache("k", (bucket,), text, empty, {}, {})

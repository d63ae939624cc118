"""Buckets: sizes within their limits, the nearest ratio, and pictures seen equally often."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from captioning import UserError
from training.data.batches import bucket_of_step, draw_batch
from training.data.buckets import BucketLimits, Size, crop_sizes, largest_size, nearest_size
from training.data.latents import LatentCache
from training.families import Base
from training.objective import Diffusion
from training.recipe import Recipe

OBJECTIVE = Diffusion("epsilon", DDPMScheduler().alphas_cumprod)
# Podell et al. 2023, appendix I: (height, width) of the upright ones.
SDXL_UPRIGHT = [
    *((2048, 512), (1984, 512), (1920, 512), (1856, 512), (1792, 576), (1728, 576), (1664, 576)),
    *((1600, 640), (1536, 640), (1472, 704), (1408, 704), (1344, 704), (1344, 768), (1280, 768)),
    *((1216, 832), (1152, 832), (1152, 896), (1088, 896), (1088, 960), (1024, 960)),
]
# Those that fill the area less than another of the same side.
NOT_FULL = [(1344, 704), (1152, 832), (1088, 896), (1024, 960)]


def sizes_or_none(resolution: int, multiple: int, limits: BucketLimits) -> tuple[Size, ...] | None:
    try:
        return crop_sizes(resolution, multiple, limits)
    except UserError:
        return None


def test_the_buckets_of_sdxl_are_its_papers() -> None:
    found = crop_sizes(1024, 8, BucketLimits(64, 4.0))
    upright = set(SDXL_UPRIGHT) - set(NOT_FULL)
    assert set(found) == {(1024, 1024)} | upright | {(width, height) for height, width in upright}


@given(
    resolution=st.integers(4, 300).map(lambda cells: 8 * cells),
    step=st.integers(8, 256),
    multiple=st.sampled_from([1, 8]),
    ratio=st.floats(1.01, 16),
    picture=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
)
def test_sizes_keep_their_limits_and_pictures_get_the_nearest(
    resolution: int, step: int, multiple: int, ratio: float, picture: Size
) -> None:
    sizes = sizes_or_none(resolution, multiple, BucketLimits(step, ratio))
    assume(sizes is not None)
    assert sizes is not None
    unit, area = math.lcm(step, multiple), resolution**2
    square = resolution // unit * unit
    for height, width in sizes:
        assert height % unit == width % unit == 0
        assert height * width <= area
        assert max(height, width) <= ratio * min(height, width)
        is_full = (height + unit) * width > area or height * (width + unit) > area
        assert is_full or (height, width) == (square, square)
    # Every other size within the limits fills less: it has one of the same side that is larger.
    assert set(sizes) == {(width, height) for height, width in sizes} and (square, square) in sizes

    height, width = nearest = nearest_size(picture, sizes)
    distances = [abs(math.log(h / w) - math.log(picture[0] / picture[1])) for h, w in sizes]
    own = abs(math.log(height / width) - math.log(picture[0] / picture[1]))
    assert own <= min(distances) + 1e-12
    # Never scaled up more than for the square crop.
    scale = max(height / picture[0], width / picture[1])
    assert scale <= resolution / min(picture) * (1 + 1e-12)
    assert largest_size(sizes)[0] * largest_size(sizes)[1] >= nearest[0] * nearest[1]


def test_every_full_size_within_the_limits_is_a_bucket() -> None:
    step, area, ratio = 16, 200**2, 3.0
    sides = range(step, 400, step)
    full = {
        (height, width)
        for height in sides
        for width in sides
        if height * width <= area < max((height + step) * width, height * (width + step))
        and max(height, width) <= ratio * min(height, width)
    }
    assert set(crop_sizes(200, 8, BucketLimits(step, ratio))) == full | {(192, 192)}


def test_limits_without_buckets_are_refused() -> None:
    assert crop_sizes(64, 8, None) == ((64, 64),)
    with pytest.raises(UserError, match="no bucket but the square"):
        crop_sizes(64, 8, BucketLimits(64, 4.0))
    with pytest.raises(UserError, match="60 px is not a multiple of 8"):
        crop_sizes(60, 8, BucketLimits(8, 4.0))


@settings(max_examples=50)
@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_buckets_come_in_proportion_and_without_long_gaps(counts: list[int]) -> None:
    total = sum(counts)
    order = []
    seen: collections.Counter[int] = collections.Counter()
    for step in range(3 * total):
        number, earlier = bucket_of_step(counts, step)
        assert earlier == seen[number]
        order.append(number)
        seen[number] += 1
    for turn in range(3):
        own = collections.Counter(order[turn * total : (turn + 1) * total])
        assert [own[number] for number in range(len(counts))] == counts
    for number, count in enumerate(counts):
        steps = [-1, *(step for step, chosen in enumerate(order) if chosen == number)]
        longest = max(after - before for before, after in itertools.pairwise(steps))
        assert longest <= 2 * total / count + 2 * len(counts)


def test_the_order_of_buckets_changes_from_turn_to_turn() -> None:
    order = [bucket_of_step((10, 10), step)[0] for step in range(80)]
    assert len({tuple(order[start : start + 20]) for start in range(0, 80, 20)}) == 4


@pytest.mark.parametrize("step_samples", [1, 3, 4])
def test_every_picture_is_seen_equally_often(
    tiny_base: Base, make_cache: Callable[..., LatentCache], step_samples: int
) -> None:
    counts = {(8, 8): 5, (4, 12): 1, (10, 6): 3}
    cache = make_cache(tiny_base, views=2, buckets=counts)
    shapes = {}
    for seed in (1, 2):
        recipe = Recipe(seed=seed, caption_dropout=0.5)
        seen: collections.Counter[int] = collections.Counter()
        for step in range(18):
            places = range(step_samples)
            batch = draw_batch(recipe, cache, step, places, step_samples, OBJECTIVE)
            seen.update(batch.images)
            shapes.setdefault(seed, []).append(tuple(batch.noise.shape[-2:]))
            for image, latents in zip(batch.images, batch.posterior_samples, strict=True):
                (own,) = [bucket for bucket in cache.buckets if image in bucket.images]
                row = own.images.index(image)
                distances = (own.mean[row] - latents).square().mean(dim=(1, 2, 3))
                assert float(distances.min()) < 0.1  # the posterior's variance is exp(-4)
            parts = [draw_batch(recipe, cache, step, [k], step_samples, OBJECTIVE) for k in places]
            assert batch.images == tuple(image for part in parts for image in part.images)
            assert torch.equal(batch.noise, torch.cat([part.noise for part in parts]))
        assert set(seen.values()) == {2 * step_samples} and len(seen) == 9
    assert shapes[1] == shapes[2]  # no trial's seed decides it
    assert collections.Counter(shapes[1]) == {shape: 2 * count for shape, count in counts.items()}

"""A picture that was shrunk before it travelled gets the answer that the whole one gets."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from captioning import STARTER_CLIP, STARTER_TAGGER, Embedder
from captioning.observers.shrink import Shrink
from captioning.observers.tagger import Tagger

SIZES = [(1024, 1024), (700, 333), (333, 701), (1000, 65), (65, 1000), (64, 64), (91, 90)]


def noise(size: tuple[int, int]) -> Pillow.Image:
    """Coarse and fine noise: every pixel that is resampled otherwise shows."""
    random = np.random.default_rng(sum(size))
    coarse = Pillow.fromarray(random.integers(0, 256, (9, 7, 3), np.uint8)).resize(size)
    grain = random.integers(-40, 41, (size[1], size[0], 3))
    return Pillow.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def tagger() -> Tagger:
    return Tagger(STARTER_TAGGER)


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(STARTER_CLIP, 1)


@pytest.mark.parametrize("size", SIZES)
def test_the_answers_are_the_same_to_the_last_bit(
    size: tuple[int, int], tagger: Tagger, embedder: Embedder
):
    picture = noise(size)
    once = tagger.shrink(picture)
    assert once.size == (64, 64)
    assert np.array_equal(tagger.shrink(once), once)
    assert tagger.observe([once]) == tagger.observe([picture])
    # The embedder hands whole pictures to transformers' own processor, which is the reference.
    assert embedder.shrink is not None
    small = embedder.shrink(picture)
    assert min(small.size) == 64
    assert np.array_equal(embedder.embed_images([small]), embedder.embed_images([picture]))


@pytest.mark.parametrize("size", SIZES)
def test_a_square_is_padded_with_white(size: tuple[int, int]):
    picture = noise(size)
    missing = [max(size) - size[1], max(size) - size[0], 0]
    around = [(each // 2, each - each // 2) for each in missing]
    square = Pillow.fromarray(np.pad(np.asarray(picture), around, constant_values=255))
    wanted = square.resize((48, 48), Pillow.Resampling.BICUBIC)
    assert np.array_equal(Shrink(48, on_white_square=True)(picture), wanted)


def test_only_what_gets_smaller_is_shrunk_and_squares_are_all_alike():
    square, long, strip = noise((100, 100)), noise((100, 200)), noise((3, 900))
    tags, clip = Shrink(64, on_white_square=True), Shrink(64, on_white_square=False)
    assert tags.on(square) == clip.on(square) and tags.on(long) != clip.on(long)
    assert tags.makes_smaller(square) and clip.makes_smaller(long)
    assert not clip.makes_smaller(strip) and not tags.makes_smaller(noise((64, 64)))


def test_a_model_that_prepares_pictures_otherwise_gets_whole_ones(tmp_path: Path):
    for change in ('"resample": 2', '"resample": 3'):
        folder = tmp_path / change[-1]
        shutil.copytree(STARTER_CLIP, folder)
        config = folder / "processor_config.json"
        config.write_text(config.read_text().replace('"resample": 3', change))
        assert (Embedder(folder, 1).shrink is None) == (change[-1] == "2")

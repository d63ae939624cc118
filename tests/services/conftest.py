"""A character that is ready for a sweep, made without any model."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioning import (
    DatasetVersion,
    Observation,
    Store,
    caption_all,
    freeze,
    load_images,
    make_character,
    observe,
    take_in,
)


class SaysTheSame:
    """Answers every picture with the same tags: sweeps don't care what the captions are."""

    def models(self):
        return {"tags": ("constant", "1")}

    def ask(self, requests):
        for sha256, kind, _data in requests:
            yield Observation(
                image=sha256,
                kind=kind,
                model="constant",
                revision="1",
                tags={"smile": 0.9},
                milliseconds=0,
            )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of twelve small pictures, all different."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 255, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def home_path(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def dataset(home_path: Path, pictures: Path) -> DatasetVersion:
    """`aya`, frozen: 9 pictures to train on and 3 held out."""
    store = Store(home_path)
    character = make_character("aya", "ayachar", "person")
    take_in(pictures, store, character)
    observe(load_images(store, "aya"), store, SaysTheSame())
    caption_all(store, character)
    return freeze(store, character, 0.25)

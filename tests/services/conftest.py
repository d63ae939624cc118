"""A character that is ready for a sweep, made without any model."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioning import (
    DatasetVersion,
    Observation,
    Store,
    add_character,
    caption_all,
    freeze,
    load_images,
    make_character,
    observe,
    take_in,
)
from services.cli.main import main


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
def lorafarm(home_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command line in this process; gives exit code, stdout and stderr."""
    monkeypatch.setenv("LORAFARM_HOME", str(home_path))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["lorafarm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out = capsys.readouterr()
        return int(end.value.code or 0), out.out, out.err

    return run


@pytest.fixture
def dataset_command(lorafarm, dataset: DatasetVersion, home_path: Path):
    """Runs `lorafarm dataset ...` on a frozen `aya` of 12 pictures."""
    add_character(Store(home_path), make_character("aya", "ayachar", "person"))
    return partial(lorafarm, "dataset")


@pytest.fixture
def dataset(home_path: Path, pictures: Path) -> DatasetVersion:
    """`aya`, frozen: 9 pictures to train on and 3 held out."""
    store = Store(home_path)
    character = make_character("aya", "ayachar", "person")
    take_in(pictures, store, character)
    observe(load_images(store, "aya"), store, SaysTheSame())
    caption_all(store, character)
    return freeze(store, character, 0.25)

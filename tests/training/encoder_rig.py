"""Bases whose text encoders are trained too, and recipes for that, of the families that can."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_families import build

from captioning import DatasetVersion
from training.data.latents import LatentCache, encode_dataset
from training.families import Base, load_base
from training.recipe import Recipe

EPS = 1e-3
OfFamily = Callable[[str], Any]


@pytest.fixture(scope="module")
def loaded(tiny_base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> OfFamily:
    """The small base of each family, once; read it, never change it."""

    def load(family: str) -> Base:
        sdxl = tmp_path_factory.mktemp("sdxl")
        return load_base(tiny_base_path if family == "sd15" else build("sdxl", sdxl))

    return functools.cache(load)


@pytest.fixture(scope="module")
def encoded(
    loaded: OfFamily, tiny_dataset: DatasetVersion, tmp_path_factory: pytest.TempPathFactory
) -> OfFamily:
    folder = tmp_path_factory.mktemp("latents")
    return functools.cache(
        lambda family: encode_dataset(tiny_dataset, loaded(family), 64, False, folder / family)
    )


@pytest.fixture(params=["sd15", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(family: str, loaded: OfFamily) -> Base:
    """The base with networks of its own, as if loaded afresh."""
    base: Base = copy.copy(loaded(family))
    base.denoiser = copy.deepcopy(base.denoiser)
    base.text_encoders = copy.deepcopy(base.text_encoders)
    return base


@pytest.fixture
def cache(family: str, encoded: OfFamily) -> LatentCache:
    cache: LatentCache = encoded(family)
    return cache


def small(network: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": {"rank": 4, "text_encoder": {"rank": 3, "lr": 3e-3}, **(network or {})},
        # Adam divides by the size of a gradient; eps keeps rounding in the smallest ones small.
        "optimizer": {"lr": 1e-2, "eps": EPS},
        "steps": 4,
        "checkpoint_every": 2,
        "batch_size": 2,
        "caption_dropout": 0.3,
        "min_snr_gamma": None,
    }
    return Recipe.model_validate({**data, **changes})

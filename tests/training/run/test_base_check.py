"""What a base or this machine does not have is said before training, from configs alone."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from captioning import UserError
from training import check_on_base
from training.fitting import fit_recipe
from training.recipe import Recipe


@pytest.fixture(scope="module")
def folder(tiny_base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with files of weights that nothing can read."""
    folder = tmp_path_factory.mktemp("weightless") / "base"
    shutil.copytree(tiny_base_path, folder)
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")
    return folder


def recipe(**said: Any) -> Recipe:
    return fit_recipe(Recipe.model_validate(said), "sd15", "test")


@pytest.mark.parametrize(
    ("said", "field", "reason", "fix"),
    [
        (
            {"network": {"targets": "regex:to_qq$"}},
            "network.targets",
            "names no linear layer and no convolution",
            r"module names such as \S+to_q,",
        ),
        (
            {"network": {"targets": "regex:to_q$", "conv_rank": 4}},
            "network.conv_rank",
            "of more than one cell",
            "leave them out",
        ),
        (
            {"network": {"targets": "regex:to_q$", "conv_alpha": 4.0}},
            "conv_alpha",
            "of more than one cell",
            "leave them out",
        ),
        (
            {"network": {"init": "pissa", "rank": 128}},
            "network.rank",
            "has 16 singular values",
            "set it to 16 or less",
        ),
        (
            {"network": {"init": "pissa", "rank": 8, "text_encoder": {"rank": 33}}},
            "network.text_encoder.rank",
            "has 32 singular values",
            "set it to 32 or less",
        ),
        ({"resolution": 60}, "resolution", "60 px is not a multiple of 8", "use 64"),
        (
            {"resolution": 64, "aspect_buckets": True},
            "aspect_buckets",
            "no bucket but the square",
            "smaller bucket_step_px",
        ),
        ({"aspect_buckets": True}, "aspect_buckets", "at 64 px", "smaller bucket_step_px"),
    ],
)
def test_what_the_base_does_not_have_is_refused(
    folder: Path, said: dict[str, Any], field: str, reason: str, fix: str
) -> None:
    with pytest.raises(UserError, match=rf"(?s){field}.*{reason}.*{fix}"):
        check_on_base([recipe(), recipe(**said)], folder)


def test_what_the_base_has_passes(folder: Path) -> None:
    networks = [
        {"targets": "attention+ff+conv", "conv_rank": 4},
        {"targets": "regex:.", "conv_rank": 4},
        {"targets": "regex:to_q$", "init": "pissa", "rank": 16},
        {"rank": 256},
        {"text_encoder": {}, "targets": "attention+ff"},
    ]
    recipes = [recipe(network=network) for network in networks]
    recipes += [recipe(resolution=32), recipe(aspect_buckets=True, bucket_step_px=8)]
    check_on_base(recipes, folder)


def test_packages_are_asked_for_where_training_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    eight_bit, quantised = recipe(optimizer={"type": "adamw8bit"}), recipe(base_precision="nf4")
    with pytest.raises(UserError, match=r"(?s)optimizer.type.*bitsandbytes.*8bit"):
        check_on_base([eight_bit], folder)
    with pytest.raises(UserError, match=r"(?s)base_precision.*nf4 needs.*bitsandbytes.*auto"):
        check_on_base([quantised], folder)
    check_on_base([eight_bit, quantised], folder, trains_here=False)

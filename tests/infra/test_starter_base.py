"""What trains and measures the starter base: it starts from the tree, goes on, and is judged."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "infra/starter"
BASE = ROOT / "training/starter"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch):
    """The build's scripts can be imported by name, as they import each other."""
    monkeypatch.syspath_prepend(str(STARTER))
    yield
    for file in STARTER.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder with a few made-up training pictures."""
    import avatars

    rng = random.Random(5)
    drawn = [avatars.draw_avatar(avatars.draw_identity("micah", rng), rng) for _ in range(40)]
    lines = [json.dumps(asdict(avatar)) for avatar in drawn]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    pixels = np.random.default_rng(5).integers(0, 256, (40, 64, 64, 3), np.uint8)
    np.save(tmp_path / "train.npy", pixels)
    return tmp_path


def test_a_work_folder_starts_from_the_tree_and_trains_on(work: Path) -> None:
    import adopt
    import diffusion
    import pictures
    from kept_out_error import kept_out_error

    adopt.adopt(work)
    tree = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    made = diffusion.pipeline(work)
    for part in ("unet", "vae", "text_encoder"):
        wanted = getattr(tree, part).state_dict()
        for name, value in getattr(made, part).state_dict().items():
            assert torch.equal(value, wanted[name]), name
    pixels, avatars = pictures.load(work, "train")
    fifths = kept_out_error(made, pixels, avatars)
    assert fifths == kept_out_error(tree, pixels, avatars)
    assert len(fifths) == 5
    assert min(fifths) > 0
    assert max(fifths) < 2
    assert np.load(work / "latents.npy").shape == (80, 16, 8, 8)  # as drawn, then mirrored
    for step in (adopt.TREE_STEPS, adopt.TREE_STEPS + 1):
        assert diffusion.start(work).step == step
        diffusion.train(work, step + 1)
    before = (work / diffusion.CHECKPOINT).read_bytes()
    adopt.adopt(work)
    assert (work / diffusion.CHECKPOINT).read_bytes() == before


def test_a_batch_follows_from_its_step_alone(work: Path) -> None:
    import adopt
    import diffusion
    from diffusion_data import Batches

    adopt.adopt(work)
    batches = Batches(work, 4, diffusion.scheduler().alphas_cumprod)
    one, two, three = batches.between(5, 8)
    (again,) = batches.between(6, 7)
    for name in ("noisy", "v", "t", "ids"):
        assert torch.equal(getattr(two, name), getattr(again, name))
    assert not torch.equal(one.noisy, two.noisy)
    assert not torch.equal(two.noisy, three.noisy)


def test_times_cover_every_noise_level_and_most_are_of_detail() -> None:
    import diffusion_data

    t = diffusion_data.times(20_000, 1000, torch.Generator().manual_seed(9))
    counts = torch.bincount(t // 100, minlength=10) / len(t)
    assert len(counts) == 10
    assert counts.min() > 0.9 * diffusion_data.TIME_EVEN_SHARE / 10
    assert counts[2:6].sum() > 0.5


def test_an_open_ended_rate_warms_up_a_new_optimiser_and_falls_with_the_root() -> None:
    from training_state import open_ended_factor

    assert open_ended_factor(0, 0, 1000) == pytest.approx(0.01)
    assert open_ended_factor(500, 500, 1000) == 1
    assert open_ended_factor(4000, 4000, 1000) == pytest.approx(0.5)
    assert open_ended_factor(4000, 49, 1000) == pytest.approx(0.25)


def test_every_tag_belongs_to_a_group() -> None:
    import avatars
    import captions
    import groups
    import styles

    assert groups.group("mohawk") == "hair shape"
    assert groups.group("brown hair") == "hair colour"
    assert groups.group("brown skin") == "skin"
    assert groups.group("closed eyes") == groups.group("angry") == "expression"
    rng = random.Random(6)
    shapes = {word for style in styles.HAIR_VARIANTS.values() for word in style}
    for style in styles.TRAIN_STYLES:
        for _ in range(50):
            avatar = avatars.draw_avatar(avatars.draw_identity(style, rng), rng)
            for tag in captions.tags(avatar)[1:]:
                found = groups.group(tag)
                assert found in groups.GROUPS
                assert (found == "hair shape") == (tag in shapes), tag


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_kernel_distance_tells_crowds_apart() -> None:
    import resemblance

    rng = np.random.default_rng(7)
    one, same, other = (unit(rng.normal(size=(400, 16)) + at) for at in (0.0, 0.0, 0.5))
    assert resemblance.kernel_distance(one, same) == pytest.approx(0, abs=0.05)
    assert resemblance.kernel_distance(one, other) > 0.5


def test_copies_are_found() -> None:
    import resemblance

    rng = np.random.default_rng(8)
    trained, kept_out, new = (unit(rng.normal(size=(300, 16))) for _ in range(3))
    copies = unit(trained[:150] + 0.01 * rng.normal(size=(150, 16)))
    assert resemblance.copied_share(new, kept_out, trained) < 0.05
    half = np.concatenate([copies, new[:150]])
    assert resemblance.copied_share(half, kept_out, trained) == pytest.approx(0.5, abs=0.05)


def test_the_build_can_be_told_to_train_the_base_on() -> None:
    import argparse

    import build

    none = {"only": None, "until": None}
    chosen = build.chosen(argparse.Namespace(continue_base=True, **none))
    assert chosen == ["render", "adopt", "diffusion"]
    whole = build.chosen(argparse.Namespace(continue_base=False, **none))
    assert "adopt" not in whole
    assert whole[-1] == "evaluate"

"""What measures the starter base judges as it should."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "infra/starter"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch):
    """The build's scripts can be imported by name, as they import each other."""
    monkeypatch.syspath_prepend(str(STARTER))
    yield
    for file in STARTER.glob("*.py"):
        sys.modules.pop(file.stem, None)


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

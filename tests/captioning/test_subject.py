"""The subject's box, on pictures where it is known where the subject is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from captioning import Box, upright_rgb
from captioning.observers.subject import SubjectFinder, find_subject

DEMO = sorted((Path(__file__).parents[2] / "services/cli/demo/pictures").glob("*/*.png"))


def textured(size: tuple[int, int], box: tuple[int, int, int, int]) -> Pillow.Image:
    """A plain canvas with a patch of coloured squares in `box` (left, top, right, bottom) px."""
    canvas = Pillow.new("RGB", size, (180, 190, 200))
    width, height = box[2] - box[0], box[3] - box[1]
    squares = np.random.default_rng(1).integers(0, 255, (6, 6, 3), np.uint8)
    patch = Pillow.fromarray(squares).resize((width, height), Pillow.Resampling.NEAREST)
    canvas.paste(patch, box[:2])
    return canvas


def overlap(found: Box, left: float, top: float, right: float, bottom: float) -> float:
    """Intersection over union with a box in shares."""
    wide = min(found.left + found.width, right) - max(found.left, left)
    high = min(found.top + found.height, bottom) - max(found.top, top)
    both = max(0.0, wide) * max(0.0, high)
    return both / (found.width * found.height + (right - left) * (bottom - top) - both)


@pytest.mark.parametrize(
    "box", [(50, 60, 200, 260), (300, 40, 560, 200), (100, 100, 500, 380), (420, 220, 620, 390)]
)
def test_a_patch_on_a_plain_canvas_is_boxed(box: tuple[int, int, int, int]):
    (found,) = find_subject(textured((640, 400), box))
    assert overlap(found, box[0] / 640, box[1] / 400, box[2] / 640, box[3] / 400) > 0.6
    assert found.label == "subject" and 0 < found.score <= 1


def test_the_box_follows_the_subject_of_the_demo_pictures():
    """Their background is one colour, so every other pixel belongs to the character."""
    overlaps = []
    for file in DEMO:
        picture = upright_rgb(file.read_bytes())
        pixels = np.asarray(picture, np.int16)
        other = (np.abs(pixels - pixels[0, 0]).max(-1) > 12).nonzero()
        height, width = pixels.shape[:2]
        top, bottom = other[0].min() / height, (other[0].max() + 1) / height
        left, right = other[1].min() / width, (other[1].max() + 1) / width
        (found,) = find_subject(picture)
        overlaps.append(overlap(found, left, top, right, bottom))
    assert np.mean(overlaps) > 0.55
    assert np.mean(np.array(overlaps) > 0.3) > 0.95


@pytest.mark.parametrize("colour", ["white", "black", (10, 200, 90)])
def test_a_blank_picture_has_no_subject(colour: object):
    assert find_subject(Pillow.new("RGB", (300, 200), colour)) == ()


def test_the_box_lies_inside_and_two_runs_agree():
    picture = textured((333, 777), (0, 0, 333, 777))
    (found,) = find_subject(picture)
    assert found.left >= 0 and found.top >= 0
    assert found.left + found.width <= 1 and found.top + found.height <= 1
    assert SubjectFinder().observe([picture, picture]) == [(found,), (found,)]

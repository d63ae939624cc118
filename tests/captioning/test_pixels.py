"""Pictures as arrays and back: every pixel as it was, and nothing copied where Pillow allows it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioning.pixels import picture_of, pixels_of


def drawn(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


@given(width=st.integers(1, 70), height=st.integers(1, 70))
def test_they_come_back_as_they_were(width: int, height: int) -> None:
    picture = drawn(width, height)
    pixels = pixels_of(picture)
    assert np.array_equal(pixels[..., :3], np.asarray(picture))
    assert picture_of(pixels) == picture


def test_a_picture_that_lies_in_pieces_too() -> None:
    picture = drawn(2100, 2100)  # over 16 MB
    assert picture_of(pixels_of(picture)) == picture


def test_both_ways_it_is_the_same_memory_which_outlives_what_it_came_from() -> None:
    picture = drawn(40, 30)
    expected = picture.copy()
    address = pixels_of(picture).ctypes.data
    assert pixels_of(picture).ctypes.data == address
    pixels = pixels_of(picture)
    del picture
    back = picture_of(pixels)
    assert pixels_of(back).ctypes.data == pixels.ctypes.data
    del pixels
    assert back == expected


def test_who_changes_a_picture_changes_a_copy() -> None:
    pixels = pixels_of(drawn(8, 8))
    before = pixels.copy()
    picture_of(pixels).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(pixels, before)
    with pytest.raises(ValueError, match="read-only"):
        pixels[0, 0] = 0

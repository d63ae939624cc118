"""Every kind of picture becomes what people see of it; everything else is refused with a reason."""

import functools

import numpy as np
import pytest
from captioning_examples import png, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from captioning import PictureError, upright_rgb
from captioning.decode import decode, inspect

RED, WHITE = (255, 0, 0), (255, 255, 255)


def half(mode: str, colour: object, rest: object, size: tuple[int, int] = (40, 20)) -> Pillow.Image:
    """A picture whose left half has one colour and whose right half another."""
    picture = Pillow.new(mode, size, rest)
    picture.paste(colour, (0, 0, size[0] // 2, size[1]))
    return picture


def left_and_right(data: bytes) -> tuple[object, object]:
    picture = upright_rgb(data)
    assert picture.mode == "RGB"
    return picture.getpixel((2, 10)), picture.getpixel((picture.width - 3, 10))


def test_transparency_is_laid_on_white():
    see_through = half("RGBA", (255, 0, 0, 255), (0, 0, 0, 0))
    assert left_and_right(saved(see_through, "PNG")) == (RED, WHITE)
    assert left_and_right(saved(half("LA", (0, 255), (0, 0)), "PNG")) == ((0, 0, 0), WHITE)


def test_a_palette_with_a_transparent_colour_is_laid_on_white():
    palette = half("P", 0, 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert left_and_right(saved(palette, "PNG", transparency=1)) == (RED, WHITE)
    assert left_and_right(saved(palette, "GIF", transparency=1)) == (RED, WHITE)


def test_a_colour_declared_transparent_is_laid_on_white():
    assert left_and_right(saved(half("RGB", "red", "blue"), "PNG", transparency=(0, 0, 255))) == (
        RED,
        WHITE,
    )


def test_sixteen_bit_grey_keeps_its_tones():
    ramp = np.repeat(np.linspace(0, 65535, 64, dtype=np.uint16)[None], 40, axis=0)
    for kind in ("PNG", "TIFF"):
        seen = np.asarray(upright_rgb(saved(Pillow.fromarray(ramp), kind)))
        assert (seen[:, :, 0] == ramp >> 8).all()


def test_cmyk_becomes_rgb():
    red, white = left_and_right(saved(half("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), "JPEG"))
    assert np.abs(np.subtract(red, RED)).max() < 6
    assert np.abs(np.subtract(white, WHITE)).max() < 6


def test_of_an_animation_the_first_frame_is_seen():
    frames = [Pillow.new("RGB", (40, 20), name) for name in ("red", "blue", "green")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert left_and_right(data) == (RED, RED)
        assert inspect(data).frames == 3


@pytest.mark.parametrize(
    ("at_least_px", "size"),
    [(75, (125, 76)), (76, (250, 151)), (151, (500, 302)), (302, (1000, 603)), (9000, (1000, 603))],
)
def test_a_jpeg_may_come_smaller_but_never_below_what_is_asked(at_least_px: int, size):
    for mode in ("RGB", "L", "CMYK"):
        data = saved(half(mode, 0, "white", (1000, 603)), "JPEG", quality=95)
        small, kind = decode(data, at_least_px)
        assert (small.size, small.mode, kind) == (size, "RGB", "JPEG")
        exact = decode(data)[0].resize(size, Pillow.Resampling.BOX)
        far = np.abs(np.subtract(np.asarray(small, int), np.asarray(exact, int)))
        assert np.median(far) <= 1
    assert decode(saved(Pillow.new("RGB", (900, 700)), "PNG"), at_least_px)[0].size == (900, 700)


def test_a_smaller_jpeg_is_turned_upright_too():
    exif = Pillow.Exif()
    exif[0x0112] = 6
    data = saved(Pillow.new("RGB", (800, 400)), "JPEG", exif=exif)
    assert decode(data, 100)[0].size == (100, 200)


def test_a_picture_taken_sideways_is_turned_upright():
    exif = Pillow.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    data = saved(half("RGB", "red", "blue"), "JPEG", exif=exif, quality=95)
    picture = upright_rgb(data)
    assert picture.size == (20, 40)
    top, bottom = picture.getpixel((10, 3)), picture.getpixel((10, 36))
    assert top[0] > 200 > bottom[0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file"),
        (b"just a text", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\nshowpage\n", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (saved(Pillow.new("F", (40, 40)), "TIFF"), "floating-point"),
    ],
)
def test_what_is_no_picture_is_refused(data: bytes, reason: str):
    with pytest.raises(PictureError, match=reason):
        upright_rgb(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF"])
def test_a_truncated_picture_is_refused(kind: str):
    data = whole(kind)
    with pytest.raises(PictureError):
        upright_rgb(data[: len(data) // 2])


def test_a_decompression_bomb_is_refused():
    bomb = bytearray(png())
    header = bytes(bomb[12:16]) + (60_000).to_bytes(4) * 2 + bytes(bomb[24:29])
    bomb[12:29] = header
    import zlib

    bomb[29:33] = zlib.crc32(header).to_bytes(4)
    with pytest.raises(PictureError, match="too large"):
        upright_rgb(bytes(bomb))


@functools.cache
def whole(kind: str) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)
    return saved(Pillow.fromarray(pixels), kind)


@settings(max_examples=200)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "AVIF"]),
    edits=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
    length=st.floats(0, 1),
)
def test_damaged_bytes_give_a_picture_or_one_kind_of_error(
    kind: str, edits: list[tuple[float, int]], length: float
):
    data = bytearray(whole(kind))
    for place, value in edits:
        data[int(place * min(len(data), 400))] = value  # the headers are where it hurts
    try:
        assert upright_rgb(bytes(data[: int(length * len(data))])).mode == "RGB"
    except PictureError as error:
        assert str(error)

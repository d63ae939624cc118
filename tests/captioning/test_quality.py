"""What the quality observer measures, on pictures whose defects are known."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import imagehash
import numpy as np
import pytest
from captioning_examples import saved
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFilter, ImageOps

from captioning import Box, upright_rgb
from captioning.observers.quality import QualityMeter, effective_px, measure, sharpness

DEMO = sorted((Path(__file__).parents[2] / "services/cli/demo/pictures").glob("*/*.png"))
WHOLE = Box(label="all", score=1, left=0, top=0, width=1, height=1)
FILTERS = [Pillow.Resampling.BILINEAR, Pillow.Resampling.BICUBIC, Pillow.Resampling.LANCZOS]


@cache
def drawing(side: int) -> Pillow.Image:
    """Flat shapes with outlines: a drawing that is sharp at any size."""
    scale = 2 * side / 1024  # drawn at twice the size and shrunk, for smooth edges
    canvas = Pillow.new("RGB", (2 * side, 2 * side), (240, 235, 225))
    draw = ImageDraw.Draw(canvas)
    random = np.random.default_rng(1)
    for _ in range(24):
        x, y = random.uniform(100, 924, 2)
        radius = random.uniform(30, 120)
        colour = tuple(int(value) for value in random.integers(60, 255, 3))
        corners = (x - radius, y - radius, x + radius, y + radius)
        box = [scale * value for value in corners]
        draw.ellipse(box, fill=colour, outline=(20, 20, 20), width=round(3 * scale))
    return canvas.resize((side, side), Pillow.Resampling.LANCZOS)


def grey(picture: Pillow.Image) -> Pillow.Image:
    return picture.convert("L")


@pytest.fixture(scope="module", params=[512, 1024, 2048])
def sharp(request: pytest.FixtureRequest) -> Pillow.Image:
    return drawing(request.param)


def test_sharpness_hardly_depends_on_the_size_a_drawing_was_saved_at():
    values = [sharpness(grey(drawing(side)), WHOLE) for side in (512, 1024, 2048)]
    assert max(values) < 1.5 * min(values)


def test_blur_is_seen_at_every_size(sharp: Pillow.Image):
    at_1024 = sharp.width / 1024
    blurred = [
        sharpness(grey(sharp.filter(ImageFilter.GaussianBlur(radius * at_1024))), WHOLE)
        for radius in (0, 2, 6, 25)
    ]
    assert blurred == sorted(blurred, reverse=True)
    assert blurred[1] < 0.25 * blurred[0]  # a 2 px blur is told from the sharp drawing
    assert blurred[2] < 20 and blurred[3] < 20


def test_a_background_out_of_focus_is_no_blur():
    # A subject on a third of the width, in front of soft clouds.
    random = np.random.default_rng(2)
    clouds = Pillow.fromarray(random.integers(150, 250, (6, 6, 3), np.uint8))
    picture = clouds.resize((768, 768), Pillow.Resampling.BICUBIC)
    subject = drawing(512).resize((256, 256), Pillow.Resampling.LANCZOS)
    picture.paste(subject, (300, 200))
    within = measure(picture).sharpness
    assert within > 1.5 * sharpness(grey(picture), WHOLE)
    soft = picture.filter(ImageFilter.GaussianBlur(3))
    assert measure(soft).sharpness < 0.25 * within


@pytest.mark.parametrize("side", [512, 1024, 2048])
@pytest.mark.parametrize("colour", ["white", "black", (200, 180, 40)])
def test_a_blank_canvas_has_no_sharpness_no_entropy_no_contrast(side: int, colour: object):
    seen = measure(Pillow.new("RGB", (side, side), colour))
    assert (seen.sharpness, seen.entropy_bits, seen.contrast) == (0, 0, 0)


def test_blank_but_for_a_frame_is_still_blank():
    framed = ImageOps.expand(Pillow.new("RGB", (510, 510), "white"), border=1, fill="black")
    assert sharpness(grey(framed), WHOLE) > 0  # the frame is drawn, so its inner edge counts
    noisy = Pillow.new("RGB", (512, 512), "white")
    noisy.putpixel((0, 0), (0, 0, 0))  # a corner has no four neighbours
    assert sharpness(grey(noisy), WHOLE) == 0


@pytest.mark.parametrize("file", DEMO[::8], ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_an_enlarged_picture_is_told_from_a_native_one(file: Path):
    native = grey(upright_rgb(file.read_bytes()))  # 256 px
    assert effective_px(native) is None
    for side in (64, 96, 128):  # the shares that 256, 384 and 512 are of 1024
        for enlarge in FILTERS:
            small = native.resize((side, side), Pillow.Resampling.LANCZOS)
            # A soft picture may have room in less than the size that it was enlarged from.
            found = effective_px(small.resize((256, 256), enlarge))
            assert found is not None and side / 2 <= found <= side


@pytest.mark.parametrize("enlarged", [1024, 2048])
def test_the_true_size_of_a_large_picture_is_given_in_px(enlarged: int):
    native = upright_rgb(DEMO[0].read_bytes()).resize((256, 256))
    big = native.resize((enlarged, enlarged), Pillow.Resampling.BICUBIC)
    assert effective_px(grey(big)) == 256
    assert effective_px(grey(drawing(enlarged))) is None


@pytest.mark.parametrize("size", [(1024, 1024), (640, 1100), (4096, 2048)])
@pytest.mark.parametrize("share", [0.25, 0.375, 0.5])
def test_a_wave_needs_the_side_that_its_period_fits_into(size: tuple[int, int], share: float):
    width, height = size
    short = min(width, height)
    # The share is one of 1024 px, a larger picture's reference, or of a shorter side.
    side = round(share * min(short, 1024))
    for along, length in ((0, height), (1, width)):
        # Half a period to a pixel of the small picture at the most; these have a bit less and more.
        for finer in (0.98, 1.02):
            halves = round(finer * side / short * length)
            wave = 128 + 60 * np.cos(np.pi * halves * (np.arange(length) + 0.5) / length)
            pixels = np.broadcast_to(wave[:, None] if along == 0 else wave, (height, width))
            seen = effective_px(Pillow.fromarray(pixels.round().astype(np.uint8)))
            assert seen == side if finer < 1 else seen is None or seen > side


def test_sharpness_is_that_of_the_box_in_the_resized_picture():
    picture = grey(drawing(512)).resize((700, 933), Pillow.Resampling.LANCZOS)
    resized = np.asarray(picture.resize((512, 682), Pillow.Resampling.BICUBIC), np.float64)
    around = resized[:-2, 1:-1] + resized[2:, 1:-1] + resized[1:-1, :-2] + resized[1:-1, 2:]
    laplacian = around - 4 * resized[1:-1, 1:-1]  # (680, 510)
    box = Box(label="half", score=1, left=0.1, top=0.25, width=0.5, height=0.5)
    assert sharpness(picture, box) == pytest.approx(laplacian[170:510, 51:306].var(), rel=1e-4)
    assert sharpness(picture, WHOLE) == pytest.approx(laplacian.var(), rel=1e-4)


def test_exposure():
    half = Pillow.new("RGB", (100, 100), "black")
    half.paste("white", (0, 0, 100, 25))
    seen = measure(half)
    assert (seen.dark_share, seen.bright_share, seen.luminance) == (0.75, 0.25, 0.25)
    assert seen.contrast == pytest.approx(np.sqrt(0.25 * 0.75), abs=1e-5)
    assert seen.entropy_bits == pytest.approx(0.81128, abs=1e-5)  # H(1/4)


def test_grey_pictures_have_no_colour_and_pure_red_has_all():
    picture = upright_rgb(DEMO[0].read_bytes())
    assert measure(picture.convert("L").convert("RGB")).colourfulness == 0
    assert measure(Pillow.new("RGB", (64, 64), (255, 0, 0))).colourfulness == 1
    assert 0 < measure(picture).colourfulness < 1


def test_equal_pixels_are_equal_in_any_format_and_not_across_sizes():
    picture = drawing(512).resize((60, 40))
    png, webp = (
        upright_rgb(saved(picture, "PNG")),
        upright_rgb(saved(picture, "WEBP", lossless=True)),
    )
    turned = Pillow.frombytes("RGB", (40, 60), picture.tobytes())  # the same bytes, another shape
    assert measure(png).pixels_sha256 == measure(webp).pixels_sha256
    assert measure(png).pixels_sha256 != measure(turned).pixels_sha256


def test_the_perceptual_hash_is_imagehashs_and_survives_resizing():
    picture = upright_rgb(DEMO[0].read_bytes())
    seen = imagehash.hex_to_hash(measure(picture).phash)
    assert seen == imagehash.phash(picture)
    assert seen - imagehash.hex_to_hash(measure(picture.resize((128, 128))).phash) <= 6
    assert seen - imagehash.hex_to_hash(measure(upright_rgb(DEMO[-1].read_bytes())).phash) > 10


@given(
    width=st.integers(32, 90),
    height=st.integers(32, 90),
    seed=st.integers(0, 99),
    levels=st.integers(1, 256),
)
def test_every_figure_stays_in_its_range_and_two_runs_agree(
    width: int, height: int, seed: int, levels: int
):
    pixels = np.random.default_rng(seed).integers(0, levels, (height, width, 3), np.uint8)
    picture = Pillow.fromarray(pixels)
    seen = measure(picture)
    assert seen == QualityMeter().observe([picture])[0]
    assert 0 <= seen.luminance <= 1 and 0 <= seen.contrast <= 0.5 + 1e-6
    assert seen.dark_share + seen.bright_share <= 1 + 1e-6
    assert 0 <= seen.entropy_bits <= 8 and 0 <= seen.colourfulness <= 1
    assert seen.sharpness >= 0
    assert seen.effective_px is None or seen.effective_px * 2 <= min(width, height)
    assert len(seen.phash) == 16 and len(seen.pixels_sha256) == 64

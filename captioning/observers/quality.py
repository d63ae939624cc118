"""What pixels alone say about a picture: sharpness, true resolution, exposure, hashes.

Upright RGB pictures in, `Quality` out. No model and no threshold: what is too blurred or too dark
is decided later, against the other pictures of the set.
"""

from __future__ import annotations

import hashlib
import math

import imagehash
import numpy as np
from PIL import Image, ImageChops
from scipy.fft import dct

from captioning.observations import Box, Quality
from captioning.observers.subject import find_subject

# Goes up whenever a formula below changes, so that stored figures are never mixed.
REVISION = "3"
# The Laplacian's variance depends on size; at this short side it holds still (865, 1111 and 786 for
# one drawing saved at 512, 1024 and 2048 px).
SHARPNESS_SIDE_PX = 512
# Where the subject is, the perceptual hash and the chroma need no detail: all three are taken of
# one copy, averaged over whole pixels to a short side between this and its double.
SMALL_SIDE_PX = 256
# A picture that has no finer detail than fits into one of these short sides was enlarged from it;
# 768 speaks for bases that train at 1024.
EFFECTIVE_SIDES_PX = (256, 384, 512, 768)
# A picture below 1024 px is tried at the same shares of its short side that these are of 1024.
REFERENCE_SIDE_PX = 1024
# Closer than a factor of 2 a smooth native picture can't be told from an enlarged one.
SMALLEST_ENLARGEMENT = 2
# Without what is finer than a quarter to a half of their size, native demo pictures give 25 to
# 42 dB (median 29 to 34); without what is finer than the size they were enlarged from, 41 to 56.
NOTHING_LOST_DB = 40.0
# So many rows, and columns, evenly spaced, stand for all: of 1024 px that gives what all of them
# give within 0.3 dB.
LINES = 128
# Where the subject is when nothing stands out.
CENTRE = Box(label="centre", score=0, left=0.25, top=0.25, width=0.5, height=0.5)
DARK_GREY, BRIGHT_GREY = 0.05 * 255, 0.95 * 255
GREYS = np.arange(256)


class QualityMeter:
    """The observer of kind `quality`; `id` and `revision` name it in observations."""

    id = "quality"
    revision = REVISION
    shrink = None

    def observe(self, pictures: list[Image.Image]) -> list[Quality]:
        """One `Quality` for each upright RGB picture."""
        return [measure(picture) for picture in pictures]


def measure(picture: Image.Image) -> Quality:
    """All figures of one upright RGB picture; see `Quality` for their units."""
    grey = picture.convert("L")
    small = picture.reduce(max(1, min(picture.size) // SMALL_SIDE_PX))
    found = find_subject(small)
    counts = np.array(grey.histogram(), np.float64)
    shares = counts / counts.sum()
    luminance = float(GREYS @ shares)
    variance = float((GREYS - luminance) ** 2 @ shares)
    present = shares[shares > 0]
    return Quality(
        sharpness=round(sharpness(grey, found[0] if found else CENTRE), 3),
        effective_px=effective_px(grey),
        luminance=round(luminance / 255, 5),
        dark_share=round(float(shares[GREYS < DARK_GREY].sum()), 5),
        bright_share=round(float(shares[GREYS > BRIGHT_GREY].sum()), 5),
        contrast=round(math.sqrt(variance) / 255, 5),
        # + 0.0: a blank picture has an entropy of 0, not of -0.
        entropy_bits=round(float(-(present * np.log2(present)).sum()), 5) + 0.0,
        colourfulness=round(_mean_chroma(small), 5),
        phash=str(imagehash.phash(small)),
        pixels_sha256=_pixels_sha256(picture),
    )


def sharpness(grey: Image.Image, subject: Box) -> float:
    """Variance of the Laplacian (4 neighbours) of grey 0 to 255 at a short side of 512 px.

    Only the subject's box is measured: a background out of focus is no fault, a subject is one.
    Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy". Only pixels that
    have all four neighbours count: a frame left unfiltered would make blank pictures look sharp.
    """
    scale = SHARPNESS_SIDE_PX / min(grey.size)
    width, height = max(3, round(grey.width * scale)), max(3, round(grey.height * scale))
    # Positions count filtered pixels, which have a neighbour on each side; only the box is resized.
    left, right = _within(subject.left, subject.width, width - 2)
    top, bottom = _within(subject.top, subject.height, height - 2)
    across, down = grey.width / width, grey.height / height
    # Rounding must not put the last edge outside of the picture.
    end = min(grey.width, (right + 2) * across), min(grey.height, (bottom + 2) * down)
    box = (left * across, top * down, *end)
    size = (right - left + 2, bottom - top + 2)
    pixels = np.asarray(grey.resize(size, Image.Resampling.BICUBIC, box), np.float32)  # (H, W)
    laplacian = (
        pixels[:-2, 1:-1]
        + pixels[2:, 1:-1]
        + pixels[1:-1, :-2]
        + pixels[1:-1, 2:]
        - 4 * pixels[1:-1, 1:-1]
    )
    return float(laplacian.var(dtype=np.float64))


def _within(start: float, length: float, pixels: int) -> tuple[int, int]:
    """(first, one past the last) of the pixels in a share of a side; at least one."""
    first = min(int(start * pixels), pixels - 1)
    return first, min(pixels, max(first + 1, round((start + length) * pixels)))


def effective_px(grey: Image.Image) -> int | None:
    """The smallest tried short side that holds all of the picture's detail, None when none does.

    A picture without texture (fog, a gradient) has no detail to lose and counts as enlarged too:
    reason to look at it, not to drop it.
    """
    short = min(grey.size)
    share = min(1.0, short / REFERENCE_SIDE_PX)
    sides = [round(side * share) for side in EFFECTIVE_SIDES_PX]
    sides = [side for side in sides if side * SMALLEST_ENLARGEMENT <= short]
    if not sides:
        return None
    # A bigger picture counts only with the detail of the size at which the largest side can be
    # tried: the grain of a large photo is no detail.
    finest = min(1.0, SMALLEST_ENLARGEMENT * EFFECTIVE_SIDES_PX[-1] / short)
    losses = _losses_db(grey, [side / short for side in sides], finest)
    held = [side for side, db in zip(sides, losses, strict=True) if db > NOTHING_LOST_DB]
    return min(held, default=None)


def _losses_db(grey: Image.Image, shares: list[float], finest: float) -> list[float]:
    """Peak signal to noise ratio of the picture without the detail finer than each share of it.

    What is finer than the share `finest` counts in none. A picture of n pixels a side has no
    frequency from n on in the cosine transform of its enlarged copy, and by Parseval the mean
    square of what is left out is the sum of its squared coefficients. That of rows and that of
    columns are added, so what is fine both ways counts twice. The transform mirrors at the borders,
    where Fourier's would see an edge.
    """
    pixels = np.asarray(grey)  # (H, W)
    mean_squares = np.zeros(len(shares))
    for lines in (pixels, pixels.T):
        count = min(LINES, len(lines))
        chosen = ((np.arange(count) + 0.5) * len(lines) / count).astype(int)
        coefficients = dct(lines[chosen].astype(np.float32), norm="ortho", axis=1)
        energy = np.square(coefficients).mean(0, dtype=np.float64) / lines.shape[1]
        last = math.ceil(finest * len(energy))
        mean_squares += [energy[math.ceil(share * len(energy)) : last].sum() for share in shares]
    return [10 * math.log10(255**2 / mean) if mean else math.inf for mean in mean_squares]


def _mean_chroma(picture: Image.Image) -> float:
    """Mean of max(R, G, B) - min(R, G, B), 0 to 1."""
    red, green, blue = picture.split()
    most = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    least = ImageChops.darker(ImageChops.darker(red, green), blue)
    counts = np.array(ImageChops.subtract(most, least).histogram(), np.float64)
    return float(GREYS @ counts / counts.sum() / 255)


def _pixels_sha256(picture: Image.Image) -> str:
    digest = hashlib.sha256(f"{picture.width}x{picture.height}\0".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()

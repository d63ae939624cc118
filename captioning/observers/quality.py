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

from captioning.observations import Box, Quality
from captioning.observers.subject import find_subject

# Goes up whenever a formula below changes, so that stored figures are never mixed.
REVISION = "2"
# The Laplacian's variance depends on size; at this short side it holds still (865, 1111 and 786 for
# one drawing saved at 512, 1024 and 2048 px).
SHARPNESS_SIDE_PX = 512
# A picture that loses nothing when it is shrunk to one of these short sides and enlarged again has
# no more detail than that; 768 speaks for bases that train at 1024.
EFFECTIVE_SIDES_PX = (256, 384, 512, 768)
# A picture below 1024 px is tried at the same shares of its short side that these are of 1024.
REFERENCE_SIDE_PX = 1024
# Closer than a factor of 2 a smooth native picture can't be told from an enlarged one.
SMALLEST_ENLARGEMENT = 2
# Shrunk to a half and enlarged again, native drawings give 20 to 39 dB; shrunk to the size that
# they were enlarged from, 42 dB and more.
NOTHING_LOST_DB = 40.0
# Where the subject is when nothing stands out.
CENTRE = Box(label="centre", score=0, left=0.25, top=0.25, width=0.5, height=0.5)
DARK_GREY, BRIGHT_GREY = 0.05 * 255, 0.95 * 255
GREYS = np.arange(256)


class QualityMeter:
    """The observer of kind `quality`; `id` and `revision` name it in observations."""

    id = "quality"
    revision = REVISION

    def observe(self, pictures: list[Image.Image]) -> list[Quality]:
        """One `Quality` for each upright RGB picture."""
        return [measure(picture) for picture in pictures]


def measure(picture: Image.Image) -> Quality:
    """All figures of one upright RGB picture; see `Quality` for their units."""
    grey = picture.convert("L")
    found = find_subject(picture)
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
        colourfulness=round(_mean_chroma(picture), 5),
        phash=str(imagehash.phash(grey)),
        pixels_sha256=_pixels_sha256(picture),
    )


def sharpness(grey: Image.Image, subject: Box) -> float:
    """Variance of the Laplacian (4 neighbours) of grey 0 to 255 at a short side of 512 px.

    Of the subject's box alone: a background out of focus is no fault, a subject out of focus is.
    Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy". Only pixels that
    have all four neighbours count: a frame left unfiltered would make blank pictures look sharp.
    """
    scale = SHARPNESS_SIDE_PX / min(grey.size)
    size = (max(3, round(grey.width * scale)), max(3, round(grey.height * scale)))
    pixels = np.asarray(grey.resize(size, Image.Resampling.BICUBIC), np.float32)  # (H, W)
    laplacian = (
        pixels[:-2, 1:-1]
        + pixels[2:, 1:-1]
        + pixels[1:-1, :-2]
        + pixels[1:-1, 2:]
        - 4 * pixels[1:-1, 1:-1]
    )
    rows = _within(subject.top, subject.height, len(laplacian))
    columns = _within(subject.left, subject.width, laplacian.shape[1])
    return float(laplacian[rows, columns].var(dtype=np.float64))


def _within(start: float, length: float, pixels: int) -> slice:
    """The pixels of a share of a side, at least one."""
    first = min(int(start * pixels), pixels - 1)
    return slice(first, max(first + 1, round((start + length) * pixels)))


def effective_px(grey: Image.Image) -> int | None:
    """The smallest tried short side from which the picture can be had back, None when none.

    A picture without texture (fog, a gradient) has no detail to lose and counts as enlarged too:
    reason to look at it, not to drop it.
    """
    share = min(1.0, min(grey.size) / REFERENCE_SIDE_PX)
    # A bigger picture is first brought to the size at which the largest side can be tried.
    largest = SMALLEST_ENLARGEMENT * EFFECTIVE_SIDES_PX[-1]
    if min(grey.size) > largest:
        grey = _with_short_side(grey, largest)
    sides = [round(side * share) for side in EFFECTIVE_SIDES_PX]
    sides = [side for side in sides if side * SMALLEST_ENLARGEMENT <= min(grey.size)]
    # The largest first: what even that can't give back is native, as most pictures are.
    if not sides or _loss_db(grey, sides[-1]) <= NOTHING_LOST_DB:
        return None
    return next(side for side in sides if _loss_db(grey, side) > NOTHING_LOST_DB)


def _loss_db(grey: Image.Image, side: int) -> float:
    """Peak signal to noise ratio of the picture shrunk to the short side `side` and enlarged.

    Lanczos both ways: it gives back what any of the usual filters enlarged, see the tests.
    """
    again = _with_short_side(grey, side).resize(grey.size, Image.Resampling.LANCZOS)
    counts = np.array(ImageChops.difference(grey, again).histogram(), np.float64)
    mean_square = float(GREYS**2 @ counts / counts.sum())
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def _with_short_side(grey: Image.Image, side: int) -> Image.Image:
    scale = side / min(grey.size)
    size = (max(1, round(grey.width * scale)), max(1, round(grey.height * scale)))
    return grey.resize(size, Image.Resampling.LANCZOS)


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

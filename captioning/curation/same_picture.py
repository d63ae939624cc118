"""Is one picture a copy of another, mirrored or cropped or not: decided by pixels.

Thumbnails in, a difference out. An embedding alone can't tell: it hardly changes when a profile is
mirrored and changes much when a picture is cropped, so it proposes pairs and this decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image as Pillow

from captioning.decode import upright_rgb
from captioning.intake import Image, read_image
from captioning.store import Store

# Long sides of the thumbnails, px: to find the place, and to compare there.
COARSE_PX, FINE_PX = 24, 64
# A crop that keeps less than this of a side shows another framing: a picture of its own.
LEAST_KEPT = 0.70
COARSE_STEP, FINE_STEP = 0.06, 0.012  # of the share of a side that a crop kept
# Normalised cross-correlation at 24 px under which nothing is worth a closer look.
WORTH_REFINING = 0.85
# The blur that evens out a crop's uncertain place, which is less than one pixel of 64.
SOFTENING_PX = 1.2
# The share of pixels, those that differ most, that counts: another mouth is 2 % of a portrait.
WORST_SHARE = 0.02
# Pixels of two copies differ by less than this, in standard deviations of the picture's grey.
SAME_BELOW = 0.72
# Alike but for some detail: worth a person's look when embedding or hash say the same.
LOOK_BELOW = 0.90
UNLIKE = 99.0  # the difference of pictures that do not even fit at 24 px
_KEPT_THUMBNAILS = 8192  # in memory, 4 kB each


@dataclass(frozen=True)
class Thumbnails:
    """A picture at both sizes, float32 0 to 255."""

    coarse: np.ndarray  # grey (H, W)
    fine: np.ndarray  # grey (H, W)
    colour: np.ndarray  # fine, RGB (H, W, 3)


def thumbnails(store: Store, images: list[Image]) -> Callable[[str], Thumbnails]:
    """The thumbnails by sha256, decoded when first asked for."""
    known = {image.sha256: image for image in images}

    @lru_cache(_KEPT_THUMBNAILS)
    def load(sha256: str) -> Thumbnails:
        return shrink(upright_rgb(read_image(store, known[sha256])))

    return load


def shrink(picture: Pillow.Image) -> Thumbnails:
    """Both thumbnails of a picture."""
    grey = picture.convert("L")
    return Thumbnails(_shrunk(grey, COARSE_PX), _shrunk(grey, FINE_PX), _shrunk(picture, FINE_PX))


def difference(one: Thumbnails, other: Thumbnails) -> float:
    """How far two pictures differ where they fit best, one in the other, mirrored or not.

    The mean of the pixels that differ most, in standard deviations; 0 for a copy, under
    `SAME_BELOW` for a crop that was saved again, about 2 for another expression, 99 for others.
    """
    tries = [
        (small, large, step)
        for small, large in ((one, other), (other, one))
        for step in (1, -1)  # as it is, and mirrored
    ]
    shares = np.append(np.arange(LEAST_KEPT, 1.0, COARSE_STEP), 1.0)
    fits = [
        max((_place(small.coarse[:, ::step], large.coarse, share) for share in shares), key=_fit)
        for small, large, step in tries
    ]
    best = max(range(len(tries)), key=lambda number: fits[number].correlation)
    if fits[best].correlation < WORTH_REFINING:
        return UNLIKE
    return _refined(*tries[best], fits[best].share)


def _shrunk(picture: Pillow.Image, side: int) -> np.ndarray:
    scale = side / max(picture.size)
    size = (max(4, round(picture.width * scale)), max(4, round(picture.height * scale)))
    return np.asarray(picture.resize(size, Pillow.Resampling.BOX), np.float32)


def _refined(small: Thumbnails, large: Thumbnails, step: int, share: float) -> float:
    near = np.arange(share - COARSE_STEP, share + COARSE_STEP + FINE_STEP, FINE_STEP)
    near = np.unique(near.clip(LEAST_KEPT, 1.0))
    place = max((_place(small.fine[:, ::step], large.fine, value) for value in near), key=_fit)
    height, width = place.size
    window = large.colour[place.top : place.top + height, place.left : place.left + width]
    return _worst_pixels(_resized_colour(small.colour[:, ::step], place.size), window)


@dataclass(frozen=True)
class _Place:
    """Where one thumbnail fits into another: its share of it, and the window (px)."""

    correlation: float
    share: float
    top: int
    left: int
    size: tuple[int, int]  # (height, width)


def _fit(place: _Place) -> float:
    return place.correlation


def _place(small: np.ndarray, large: np.ndarray, share: float) -> _Place:
    """Where `small` at `share` of `large` fits best; a correlation of -1 where one side of the
    crop would keep too little."""
    scale = share * min(large.shape[0] / small.shape[0], large.shape[1] / small.shape[1])
    height, width = round(small.shape[0] * scale), round(small.shape[1] * scale)
    if width < LEAST_KEPT * large.shape[1] - 1 or height < LEAST_KEPT * large.shape[0] - 1:
        return _Place(-1.0, share, 0, 0, (height, width))
    template = _resized(small, (height, width))
    centred = template - template.mean()
    windows = np.lib.stride_tricks.sliding_window_view(large, template.shape)  # (Y, X, h, w)
    dots = np.einsum("yxhw,hw->yx", windows, centred, optimize=True)
    spread = np.sqrt(np.maximum(windows.var((2, 3)) * template.size, 1e-6))
    scores = dots / (spread * max(float(np.sqrt((centred**2).sum())), 1e-6))
    top, left = np.unravel_index(int(scores.argmax()), scores.shape)
    return _Place(float(scores[top, left]), share, int(top), int(left), (height, width))


def _resized(grey: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    picture = Pillow.fromarray(np.ascontiguousarray(grey))
    return np.asarray(picture.resize(size[::-1], Pillow.Resampling.BILINEAR), np.float32)


def _resized_colour(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.stack([_resized(rgb[:, :, channel], size) for channel in range(3)], axis=-1)


def _worst_pixels(one: np.ndarray, other: np.ndarray) -> float:
    """The mean of the pixels that differ most, in standard deviations.  # (H, W, 3) each"""
    from scipy.ndimage import gaussian_filter  # slow to import, and few commands compare pictures

    apart = gaussian_filter(_standard(one) - _standard(other), (SOFTENING_PX, SOFTENING_PX, 0))
    worst = np.abs(apart).max(2).ravel()
    count = max(1, round(WORST_SHARE * worst.size))
    return float(np.sort(worst)[-count:].mean())


def _standard(rgb: np.ndarray) -> np.ndarray:
    standard: np.ndarray = (rgb - rgb.mean((0, 1))) / max(float(rgb.std()), 1.0)
    return standard

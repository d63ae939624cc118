"""Where the subject is: one box around what stands out, without any trained model.

Spectral residual saliency: Hou and Zhang, "Saliency Detection: A Spectral Residual Approach",
CVPR 2007. Upright RGB pictures in, boxes out; it knows nothing of faces or people.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

from captioning.observations import Box

REVISION = "1"  # goes up whenever a formula below changes
# Section 2.2 of the paper: the residual is taken at 64 px, averaged over 3 x 3 frequencies, and
# section 3 smooths the map (sigma 8 of their size; scaled to ours it is about 2.5).
SIDE_PX, MEAN_PX, SMOOTH_PX = 64, 3, 2.5
# The paper calls an object what is over 3 times the map's mean; drawings have broad, flat subjects
# of which only the edges stand out so far, so the limit here is lower.
TIMES_MEAN = 1.5
# The box holds this share of all that stands out; the rest are specks of the background.
HELD_SHARE = 0.95
LABEL = "subject"


class SubjectFinder:
    """The observer of kind `boxes`; `id` and `revision` name it in observations."""

    id = "subject"
    revision = REVISION
    shrink = None

    def observe(self, pictures: list[Image.Image]) -> list[tuple[Box, ...]]:
        """One box, or none for a blank picture, for each upright RGB picture."""
        return [find_subject(picture) for picture in pictures]


def find_subject(picture: Image.Image) -> tuple[Box, ...]:
    """The box around what stands out; its score is the share of saliency inside it, 0 to 1."""
    small = picture.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    channels = np.asarray(small, np.float64).transpose(2, 0, 1)  # (3, S, S)
    saliency = np.sum([_saliency(channel) for channel in channels], axis=0)  # (S, S)
    outstanding = np.where(saliency > TIMES_MEAN * saliency.mean(), saliency, 0.0)
    total = outstanding.sum()
    if total == 0:
        return ()
    top, bottom = _span(outstanding.sum(1) / total)
    left, right = _span(outstanding.sum(0) / total)
    score = float(saliency[top:bottom, left:right].sum() / saliency.sum())
    return (
        Box(
            label=LABEL,
            score=round(score, 4),
            left=left / SIDE_PX,
            top=top / SIDE_PX,
            width=(right - left) / SIDE_PX,
            height=(bottom - top) / SIDE_PX,
        ),
    )


def _saliency(channel: np.ndarray) -> np.ndarray:
    """Equations 3 to 6 of the paper on one (S, S) channel; zero where it is blank."""
    if np.ptp(channel) == 0:
        return np.zeros_like(channel)
    spectrum = np.fft.fft2(channel)
    log_amplitude = np.log(np.abs(spectrum) + 1e-9)
    residual = log_amplitude - ndimage.uniform_filter(log_amplitude, MEAN_PX, mode="wrap")
    back = np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))
    smooth: np.ndarray = ndimage.gaussian_filter(np.abs(back) ** 2, SMOOTH_PX, mode="nearest")
    return smooth


def _span(shares: np.ndarray) -> tuple[int, int]:
    """(first, one past the last) of the middle rows that hold `HELD_SHARE`."""
    tail = (1 - HELD_SHARE) / 2
    sums = np.cumsum(shares)
    first = int(np.searchsorted(sums, tail, "right"))
    last = int(np.searchsorted(sums, 1 - tail, "left"))
    return first, min(len(shares), last + 1)

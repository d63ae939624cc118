"""Is the picture in focus, compared with the rest of its set.

No absolute limit alone: a sharp picture of soft textures scores less than a blurred line drawing.
"""

from __future__ import annotations

from statistics import median

from captioning.curation.exposure import legible
from captioning.curation.limits import CurationLimits
from captioning.curation.observed import Observed
from captioning.findings import Finding

# Sharpness is measured at this short side: what is smaller is enlarged for it, and soft.
MEASURED_PX = 512
# Pictures under it are compared with those whose size differs by this factor at most.
COMPARABLE = 1.25


def sharpness_findings(pictures: list[Observed], limits: CurationLimits) -> list[Finding]:
    """IMG204: blurred; it blocks when it is far under the set and hardly has an edge."""
    measured = [
        (picture, picture.quality.sharpness)
        for picture in pictures
        if picture.quality is not None and legible(picture, limits)
    ]
    return [
        finding
        for picture, sharpness in measured
        if (finding := _against(picture, sharpness, _comparable(picture, measured), limits))
    ]


def _comparable(picture: Observed, measured: list[tuple[Observed, float]]) -> list[float]:
    side = min(picture.short_side, MEASURED_PX)
    return [
        sharpness
        for other, sharpness in measured
        if 1 / COMPARABLE <= min(other.short_side, MEASURED_PX) / side <= COMPARABLE
    ]


def _against(
    picture: Observed, sharpness: float, others: list[float], limits: CurationLimits
) -> Finding | None:
    usual = median(others)
    least = limits.blur_share * usual
    if len(others) < limits.blur_min_pictures or sharpness >= least:
        return None
    return Finding(
        code="IMG204",
        severity="block" if sharpness < limits.blur_block_below else "warn",
        where=picture.where,
        message=f"blurred: sharpness {sharpness:.0f}, the set's median is {usual:.0f}",
        value=sharpness,
        limit=round(least, 3),
        hint="use a sharper picture, or drop it; override it if the softness is meant",
    )

"""Is there enough picture: size against the base model, and whether the size is real."""

from __future__ import annotations

from captioning.curation.exposure import legible
from captioning.curation.limits import SMALLEST_GUIDED_PX, CurationLimits
from captioning.curation.observed import Observed
from captioning.findings import Finding


def resolution_findings(pictures: list[Observed], limits: CurationLimits) -> list[Finding]:
    """IMG201 too small, IMG202 under the base's resolution, IMG203 enlarged from less."""
    return [
        finding
        for picture in pictures
        for finding in (_small(picture, limits), _enlarged(picture, limits))
        if finding is not None
    ]


def _small(picture: Observed, limits: CurationLimits) -> Finding | None:
    side, least = picture.short_side, min(limits.base_px, SMALLEST_GUIDED_PX)
    if side >= limits.base_px:
        return None
    blocks = side < least
    limit = least if blocks else limits.base_px
    return Finding(
        code="IMG201" if blocks else "IMG202",
        severity="block" if blocks else "warn",
        where=picture.where,
        message=f"its short side has {side} px, the base works at {limits.base_px} px",
        value=side,
        limit=limit,
        hint="use the original in full size, or drop it"
        if blocks
        else "use a larger original if there is one",
    )


def _enlarged(picture: Observed, limits: CurationLimits) -> Finding | None:
    real = picture.quality.effective_px if picture.quality else None
    # A picture that is too small says so already; how small it once was changes nothing.
    if picture.short_side < limits.base_px or not legible(picture, limits):
        return None
    if real is None or real >= limits.base_px:
        return None
    return Finding(
        code="IMG203",
        severity="warn",
        where=picture.where,
        message=f"looks enlarged: it has no more detail than a picture of {real} px",
        value=real,
        limit=limits.base_px,
        hint="use the original before it was enlarged; very soft pictures are taken for this too",
    )

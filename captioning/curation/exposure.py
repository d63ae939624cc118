"""Is there something to see: blank, too dark, too bright, or without colour among colour."""

from __future__ import annotations

from statistics import median

from captioning.curation.limits import CurationLimits
from captioning.curation.observed import Observed
from captioning.findings import Finding
from captioning.observations import Quality


def legible(picture: Observed, limits: CurationLimits) -> bool:
    """Whether other checks can say something: not blank, not nearly all black or white.

    True for a picture whose pixels were not measured.
    """
    seen = picture.quality
    return seen is None or (
        seen.contrast >= limits.blank_contrast
        and seen.dark_share < limits.dark_share
        and seen.bright_share < limits.bright_share
    )


def exposure_findings(pictures: list[Observed], limits: CurationLimits) -> list[Finding]:
    """IMG205 blank, IMG206 too dark, IMG207 too bright, IMG208 greyscale among colour.

    A picture in which hardly anything is to be seen has that one finding only.
    """
    seen = [(picture.where, picture.quality) for picture in pictures if picture.quality is not None]
    clear = {picture.where for picture in pictures if legible(picture, limits)}
    found = [
        Finding(
            code="IMG205",
            severity="block",
            where=where,
            message="blank: nothing is to be seen",
            value=quality.contrast,
            limit=limits.blank_contrast,
            hint="drop it",
        )
        for where, quality in seen
        if quality.contrast < limits.blank_contrast
    ]
    chromas = [quality.colourfulness for where, quality in seen if where in clear]
    usual = median(chromas) if chromas else 0.0
    for where, quality in seen:
        if quality.contrast >= limits.blank_contrast:
            found += _extremes(where, quality, limits)
        if where not in clear:
            continue
        if quality.colourfulness < limits.grey_chroma and usual >= limits.colour_chroma:
            found.append(
                Finding(
                    code="IMG208",
                    severity="warn",
                    where=where,
                    message="greyscale in a set of colour pictures",
                    value=quality.colourfulness,
                    limit=limits.grey_chroma,
                    hint="use the coloured version, or make sure that its caption says monochrome",
                )
            )
    return found


def _extremes(where: str, quality: Quality, limits: CurationLimits) -> list[Finding]:
    found = []
    for code, word, share, limit in (
        ("IMG206", "dark", quality.dark_share, limits.dark_share),
        ("IMG207", "bright", quality.bright_share, limits.bright_share),
    ):
        if share >= limit:
            found.append(
                Finding(
                    code=code,
                    severity="warn",
                    where=where,
                    message=f"too {word}: {share:.0%} of it is nearly "
                    + ("black" if word == "dark" else "white"),
                    value=share,
                    limit=limit,
                    hint="use a picture with better light, or drop it",
                )
            )
    return found

"""Curation: what is wrong with a character's pictures, and which views are missing.

Stored observations in, findings out. No model is called and nothing is deleted or changed.
"""

from __future__ import annotations

from captioning.character import Character
from captioning.curation.coverage import Coverage, coverage, coverage_findings, coverage_of
from captioning.curation.duplicates import Difference, duplicate_findings
from captioning.curation.exposure import exposure_findings, legible
from captioning.curation.limits import CurationLimits
from captioning.curation.observed import Observed, load_observed
from captioning.curation.outliers import outlier_findings
from captioning.curation.proposals import propose_decisions
from captioning.curation.resolution import resolution_findings
from captioning.curation.same_picture import difference, thumbnails
from captioning.curation.sharpness import sharpness_findings
from captioning.curation.subject import subject_findings
from captioning.curation.variety import variety_findings
from captioning.decisions import kept_images
from captioning.findings import Finding, worst_first
from captioning.intake import Image
from captioning.store import Store

__all__ = [
    "Coverage",
    "CurationLimits",
    "Observed",
    "coverage",
    "curate",
    "curation_findings",
    "load_observed",
    "pixel_difference",
    "propose_decisions",
    "set_coverage",
]


def curation_findings(
    store: Store, character: Character, limits: CurationLimits | None = None
) -> list[Finding]:
    """Everything that the checks find in the character's kept pictures, worst first.

    What was not observed yet gives no findings of its kind.
    """
    images = kept_images(store, character.name)
    return curate(load_observed(store, images), limits, pixel_difference(store, images))


def curate(
    pictures: list[Observed],
    limits: CurationLimits | None = None,
    apart: Difference | None = None,
) -> list[Finding]:
    """All checks on loaded pictures, worst first; `apart` compares pixels to find copies."""
    limits = limits or CurationLimits()
    shown = [picture for picture in pictures if legible(picture, limits)]
    found = [
        *resolution_findings(pictures, limits),
        *sharpness_findings(pictures, limits),
        *exposure_findings(pictures, limits),
        *subject_findings(pictures, limits),
        *outlier_findings(shown, limits),
        *duplicate_findings(shown, limits, apart),
    ]
    redundant = len(propose_decisions(found))
    found += variety_findings(pictures, limits, redundant)
    found += coverage_findings(coverage_of(pictures, limits.tag_threshold))
    return worst_first(found)


def pixel_difference(store: Store, images: list[Image]) -> Difference:
    """Compares pictures by their thumbnails, decoded from the store when first asked for."""
    load = thumbnails(store, images)
    return lambda one, other: difference(load(one), load(other))


def set_coverage(
    store: Store, character: Character, limits: CurationLimits | None = None
) -> Coverage:
    """Framing by direction of the character's kept pictures."""
    pictures = load_observed(store, kept_images(store, character.name))
    return coverage_of(pictures, (limits or CurationLimits()).tag_threshold)

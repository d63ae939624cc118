"""What to mend in a character's pictures and captions before training.

Gathers the findings of curation and of caption lint into one value; it changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from captioning import (
    DATASET,
    DIRECTIONS,
    FRAMINGS,
    Character,
    Coverage,
    CurationLimits,
    Decision,
    Finding,
    Image,
    Override,
    Severity,
    blocking,
    caption_findings,
    captioned,
    curation_findings,
    kept_images,
    load_captions,
    load_character,
    load_decisions,
    load_observations,
    load_overrides,
    propose_decisions,
    set_coverage,
    worst_first,
)
from services.farm.settings import Home


@dataclass(frozen=True)
class DatasetCheck:
    """All that was found in one character's kept pictures."""

    character: Character
    images: tuple[Image, ...]
    captions: dict[str, str]  # by sha256; empty before captioning
    findings: tuple[Finding, ...]  # worst first
    overrides: tuple[Override, ...]
    proposed: tuple[Decision, ...]  # pictures to drop: copies, and what blocks
    coverage: Coverage
    base_px: int  # the size that the base was trained on
    observed: int  # pictures that any model has seen

    @property
    def blocks(self) -> list[Finding]:
        """The findings that stop freezing, without those that a person accepts."""
        return blocking(self.findings, self.overrides)

    @property
    def unobserved(self) -> int:
        """How many pictures no model has seen yet."""
        return len(self.images) - self.observed

    def count(self, severity: Severity) -> int:
        """Findings of one severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def name(self, where: str) -> str:
        """The source of an image, or what else a finding is about."""
        sources = {image.sha256: image.source for image in self.images}
        return sources.get(where, "the whole dataset" if where == DATASET else where[:12])


def curation_limits(home: Home) -> CurationLimits:
    """The limits for the base that the farm trains on."""
    from training import STARTER_BASE, native_size_px  # heavy: torch

    return CurationLimits(base_px=native_size_px(home.settings.base or STARTER_BASE))


def check_dataset(home: Home, name: str) -> DatasetCheck:
    """Run all checks on the kept pictures of the character `name`; no model is called."""
    store = home.store
    character = load_character(store, name)
    limits = curation_limits(home)
    images, captions = kept_images(store, name), load_captions(store, name)
    found = curation_findings(store, character, limits)
    proposed = propose_decisions(found, load_decisions(store, name), load_overrides(store, name))
    if images and all(image.sha256 in captions for image in images):
        found += caption_findings(store, character)
        # Lint read the captions as the rules give them now, and its positions count in these.
        captions = {one.image: one.caption.text for one in captioned(store, character)}
    return DatasetCheck(
        character,
        tuple(images),
        captions,
        tuple(worst_first(found)),
        tuple(load_overrides(store, name)),
        tuple(proposed),
        set_coverage(store, character, limits),
        limits.base_px,
        sum(bool(load_observations(store, image.sha256)) for image in images),
    )


def as_values(check: DatasetCheck) -> dict[str, object]:
    """The check as plain values for programs; a picture is named by sha256 and by source."""
    return {
        "character": check.character.name,
        "pictures": len(check.images),
        "base_px": check.base_px,
        "blocks": len(check.blocks),
        "findings": [
            finding.model_dump(mode="json") | {"source": check.name(finding.where)}
            for finding in check.findings
        ],
        "proposed": [decision.model_dump(mode="json") for decision in check.proposed],
        "coverage": {
            framing: {way: check.coverage.counts[framing, way] for way in DIRECTIONS}
            | {"unknown": check.coverage.framing_only[framing]}
            for framing in FRAMINGS
        },
        "missing": list(check.coverage.missing),
    }

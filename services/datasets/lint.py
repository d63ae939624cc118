"""What is wrong with a character's captions, and the mechanical mistakes mended on request.

The captioning room finds and decides; this file loads, records and gives one value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from captioning import (
    Captioned,
    Edit,
    Finding,
    Severity,
    blocking,
    caption_all,
    captioned,
    fixes,
    lint_captions,
    load_character,
    load_images,
    load_overrides,
    record_edits,
)
from services.farm.settings import Home


@dataclass(frozen=True)
class LintResult:
    """What lint says of one character's captions as the rules give them now."""

    captions: tuple[Captioned, ...]
    findings: tuple[Finding, ...]  # worst first
    blocks: tuple[Finding, ...]  # those that stop freezing, without those a person accepts
    fixed: tuple[Edit, ...]  # the edits that `fix` recorded before the findings were made
    sources: dict[str, str]  # the name of every picture by sha256

    def count(self, severity: Severity) -> int:
        """Findings of one severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def overridden(self) -> int:
        """How many blocking findings a person accepts."""
        return self.count("block") - len(self.blocks)

    def source(self, finding: Finding) -> str:
        """The name of the picture that a finding is about, or what else it is about."""
        return self.sources.get(finding.where, finding.where)


def lint_dataset(home: Home, name: str, fix: bool = False) -> LintResult:
    """Check the captions of the character `name`; `fix` records the mechanical edits first."""
    store, character = home.store, load_character(home.store, name)
    captions = captioned(store, character)
    findings = lint_captions(captions, character)
    edits: list[Edit] = []
    if fix and (edits := fixes(findings, captions, character)):
        record_edits(store, name, edits)
        caption_all(store, character)
        captions = captioned(store, character)
        findings = lint_captions(captions, character)
    return LintResult(
        tuple(captions),
        tuple(findings),
        tuple(blocking(findings, load_overrides(store, name))),
        tuple(edits),
        {image.sha256: image.source for image in load_images(store, name)},
    )


def as_rows(result: LintResult) -> list[dict[str, Any]]:
    """The findings as plain values for programs, one row each."""
    return [
        {"picture": result.source(finding)}
        | finding.model_dump()
        | {"blocks": finding in result.blocks}
        for finding in result.findings
    ]

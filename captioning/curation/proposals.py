"""From findings to decisions that a person may apply: drops, each with its code and reason.

Proposed only: nothing is dropped here, and a dropped picture stays in the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from captioning.decisions import Decision, Override, blocking
from captioning.findings import DATASET, Finding

COPIES = ("IMG230", "IMG231")
BY = "curation"


def propose_decisions(
    findings: Iterable[Finding],
    decided: Mapping[str, Decision] | None = None,
    overrides: Iterable[Override] = (),
) -> list[Decision]:
    """One drop for each picture that is a copy of a better one, or that a finding blocks.

    Never for a picture that a person has decided about (`decided`, by sha256) and never for a
    block that an override accepts. In the order of the sha256s.
    """
    listed = list(findings)
    blocks = {id(finding) for finding in blocking(listed, overrides)}
    reasons: dict[str, Finding] = {}
    for finding in listed:
        if not finding.code.startswith("IMG") or finding.where == DATASET:
            continue
        stops = id(finding) in blocks
        if stops or (finding.code in COPIES and finding.where not in reasons):
            reasons[finding.where] = finding  # a block says more than being a copy
    return [
        Decision(image=image, keep=False, code=reason.code, reason=reason.message, by=BY)
        for image, reason in sorted(reasons.items())
        if image not in (decided or {})
    ]

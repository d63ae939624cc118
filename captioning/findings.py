"""Findings: what a check says about a picture, a caption or the whole dataset.

Values only. A check returns findings and never acts on them; people act by decisions and overrides
(`decisions.py`). `block` stops freezing and training until it is mended or overridden by name.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Severity = Literal["info", "warn", "block"]
SEVERITIES: tuple[Severity, ...] = ("block", "warn", "info")  # worst first
DATASET = "dataset"  # the `where` of a finding about all pictures together


class Finding(BaseModel):
    """One thing that a check found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str = Field(pattern=r"^(IMG|CAP)\d{3}$", description="Stable; never used for another.")
    severity: Severity
    where: str = Field(description="The image's sha256, or `dataset`.")
    message: str = Field(description="What was found, in words, naming no sha256.")
    value: float | str | None = Field(None, description="What was measured.")
    limit: float | str | None = Field(None, description="What it was held against.")
    hint: str = Field("", description="What a person can do about it.")
    start: int | None = Field(None, description="First character concerned in the caption.")
    end: int | None = Field(None, description="One past the last character concerned.")
    others: tuple[str, ...] = Field((), description="Other images concerned (a duplicate group).")


def worst_first(findings: list[Finding]) -> list[Finding]:
    """Sorted by severity, then code, then where: the order of every list that people read."""
    return sorted(
        findings, key=lambda f: (SEVERITIES.index(f.severity), f.code, f.where, f.start or 0)
    )

"""`lorafarm dataset check`: what to mend in a character's pictures and captions before training.

Gathers the findings of curation and of caption lint, shows them in the terminal, as JSON or as a
page, and applies the proposed drops when asked to. Nothing is deleted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
    blocking,
    caption_findings,
    captioned,
    curation_findings,
    decide,
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

STYLES = {"block": "bold red", "warn": "yellow", "info": "cyan"}
HEADINGS = {"block": "blocks training", "warn": "look at these", "info": "good to know"}
SHOWN_PER_CODE = 8  # pictures of one code in the terminal; the page and --json show all
BLOCKED = 2  # exit code


@dataclass(frozen=True)
class DatasetCheck:
    """All that was found in one character's kept pictures."""

    character: Character
    images: tuple[Image, ...]
    captions: dict[str, str]  # by sha256; none before captioning
    findings: tuple[Finding, ...]  # worst first
    overrides: tuple[Override, ...]
    proposed: tuple[Decision, ...]
    coverage: Coverage
    base_px: int
    observed: int  # pictures that any model has seen

    @property
    def blocks(self) -> list[Finding]:
        """The findings that stop freezing, without those that a person accepts."""
        return blocking(self.findings, self.overrides)

    def count(self, severity: str) -> int:
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
        # What lint read, and its positions count in: the captions as the rules give them now.
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


def show_check(
    home: Home, name: str, page: Path | None, as_json: bool, apply: bool, console: Console
) -> int:
    """Check, show and perhaps apply; 0 when nothing blocks freezing, 2 when something does."""
    if apply:
        proposed = check_dataset(home, name).proposed
        decide(home.store, name, proposed)
        if not as_json:
            console.print(f"[green]✓[/] {_pictures(len(proposed))} dropped; `lorafarm dataset keep "
                          f"{name} <picture>` takes one back")  # fmt: skip
    check = check_dataset(home, name)
    if page is not None:
        from services.report.dataset_page import build_check_page

        build_check_page(check, home.store, page)
    if as_json:
        print(json.dumps(as_values(check), indent=1, ensure_ascii=False))
    else:
        print_check(check, console)
        if page is not None:
            console.print(f"[green]✓[/] the page with all pictures: {escape(str(page))}")
    return BLOCKED if check.blocks else 0


def as_values(check: DatasetCheck) -> dict[str, object]:
    """The check as plain values for programs; pictures by sha256 and source."""
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


def print_check(check: DatasetCheck, console: Console) -> None:
    """Findings by severity and code, coverage, and what to do next."""
    console.print(
        f"[bold]{check.character.name}[/]: {_pictures(len(check.images))}, checked for a base of "
        f"{check.base_px} px: [bold red]{check.count('block')} block[/], "
        f"[yellow]{check.count('warn')} warn[/], [cyan]{check.count('info')} info[/]"
    )
    if check.observed < len(check.images):
        console.print(
            f"  [yellow]{len(check.images) - check.observed} pictures were not observed yet: run "
            f"`lorafarm dataset caption {check.character.name}`[/]"
        )
    for severity, of_severity in groupby(check.findings, key=lambda finding: finding.severity):
        listed = list(of_severity)
        console.print(f"\n[{STYLES[severity]}]{HEADINGS[severity]}[/]")
        table = Table("code", "picture", "found", "what to do", box=None, pad_edge=False)
        for _, same in groupby(listed, key=lambda finding: finding.code):
            rows = list(same)
            hint = ""
            for finding in rows[:SHOWN_PER_CODE]:
                # The same advice is said once.
                again, hint = finding.hint == hint, finding.hint
                table.add_row(
                    finding.code,
                    escape(check.name(finding.where)),
                    escape(finding.message),
                    "″" if again else escape(hint),
                )
            if len(rows) > SHOWN_PER_CODE:
                table.add_row("", f"[dim]and {len(rows) - SHOWN_PER_CODE} more[/]", "", "")
        console.print(table)
    _print_coverage(check.coverage, console)
    _print_next(check, console)


def _print_coverage(coverage: Coverage, console: Console) -> None:
    if not any(coverage.total(framing) for framing in FRAMINGS):
        return
    console.print("\n[bold]views[/]")
    ways = [*DIRECTIONS, "not told"] if coverage.directions_told else ["pictures"]
    table = Table("", *ways, box=None, pad_edge=False)
    for framing in FRAMINGS:
        told = [coverage.counts[framing, way] for way in DIRECTIONS]
        counts = [*told, coverage.framing_only[framing]]
        shown = counts if coverage.directions_told else [coverage.total(framing)]
        table.add_row(framing, *(str(count) if count else "[dim]·[/]" for count in shown))
    console.print(table)
    if coverage.missing:
        console.print("missing: " + "; ".join(coverage.missing))
    if not coverage.directions_told:
        console.print("[dim]the tagger tells no directions, so only framings are counted[/]")


def _print_next(check: DatasetCheck, console: Console) -> None:
    name = check.character.name
    console.print()
    if check.proposed:
        console.print(
            f"{_pictures(len(check.proposed))} proposed to drop (copies, and what blocks): "
            f"`lorafarm dataset check {name} --apply`"
        )
    if check.blocks:
        console.print(
            f"[bold red]{len(check.blocks)} findings block freezing.[/] Mend them, drop the "
            f"pictures, or accept one with `lorafarm dataset override {name} <code>`"
        )
    elif check.observed == len(check.images):
        console.print("[green]✓[/] nothing blocks freezing")


def _pictures(count: int) -> str:
    return f"{count} picture" if count == 1 else f"{count} pictures"

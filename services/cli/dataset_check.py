"""`lorafarm dataset check`: findings in the terminal, as JSON, or as a page with all pictures."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from captioning import DIRECTIONS, FRAMINGS, Coverage, Severity
from services.datasets.check import DatasetCheck, as_values, check_dataset
from services.datasets.decisions import drop_proposed
from services.farm.settings import Home

STYLES: dict[Severity, str] = {"block": "bold red", "warn": "yellow", "info": "cyan"}
HEADINGS: dict[Severity, str] = {
    "block": "blocks training",
    "warn": "look at these",
    "info": "good to know",
}
SHOWN_PER_CODE = 8  # pictures of one code in the terminal; the page and --json show all


def check_command(
    home: Home, name: str, page: Path | None, as_json: bool, apply: bool, console: Console
) -> DatasetCheck:
    """Drop what is proposed if `apply`, check, and show the check; gives it."""
    if apply:
        dropped = drop_proposed(home, name)
        if not as_json:
            console.print(
                f"[green]✓[/] {_pictures(len(dropped))} dropped; `lorafarm dataset keep {name} "
                "<picture>` takes one back"
            )
    check = check_dataset(home, name)
    if page is not None:
        from services.report.dataset_page import build_check_page

        build_check_page(check, home.store, page)
    if as_json:
        print(json.dumps(as_values(check), indent=1, ensure_ascii=False))
        return check
    print_check(check, console)
    if page is not None:
        console.print(f"[green]✓[/] the page with all pictures: {escape(str(page))}")
    return check


def print_check(check: DatasetCheck, console: Console) -> None:
    """Findings by severity and code, coverage, and what to do next."""
    console.print(
        f"[bold]{check.character.name}[/]: {_pictures(len(check.images))}, checked for a base of "
        f"{check.base_px} px: [bold red]{check.count('block')} block[/], "
        f"[yellow]{check.count('warn')} warn[/], [cyan]{check.count('info')} info[/]"
    )
    if check.unobserved:
        console.print(
            f"  [yellow]{check.unobserved} pictures were not observed yet: run "
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
    elif not check.unobserved:
        console.print("[green]✓[/] nothing blocks freezing")


def _pictures(count: int) -> str:
    return f"{count} picture" if count == 1 else f"{count} pictures"

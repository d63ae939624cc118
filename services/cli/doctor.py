"""Shows what `lorafarm doctor` found: a table of the checks and a verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.farm.doctor import Check, missing_parts


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """A line for each check, with its fix where it failed, and what is missing at last."""
    table = Table("", "what", "found", "fix")
    for check in checks:
        fix = "" if check.ok else escape(check.fix)
        table.add_row(_mark(check), check.name, escape(check.found), fix)
    console.print(table)
    missing = missing_parts(checks)
    if missing:
        console.print(f"[red]missing:[/] {', '.join(check.name for check in missing)}")
    else:
        console.print("[green]ready[/] (a – is optional)")


def _mark(check: Check) -> str:
    if check.ok:
        return "[green]✓[/]"
    return "[red]✗[/]" if check.needed else "[yellow]–[/]"

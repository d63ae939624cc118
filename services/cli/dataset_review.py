"""`lorafarm dataset review`: the captions to read first, in the terminal or as a spreadsheet."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from captioning import CONFIDENCE, ImportedReviews, Queue, bad_rate_bound
from services.cli.progress import Display
from services.datasets.review import export_queue, import_reviews, queue_captions
from services.farm.settings import Home

SHOWN_CAPTIONS = 20  # in the terminal; --export gives all of the sample


def review_command(
    home: Home,
    name: str,
    export: Path | None,
    table: Path | None,
    compare: bool,
    console: Console,
) -> bool:
    """Import, then export or show; False when rows of the imported table are in conflict."""
    imported = None
    if table is not None:
        imported = import_reviews(home, name, table)
        _print_imported(imported, console)
    with Display(console) as display:
        queue = queue_captions(home, name, compare, display)
    if export is not None:
        export_queue(queue, export)
        console.print(
            f"[green]✓[/] {len(queue.sample)} captions to read: {escape(str(export))}\n"
            "  set `state` to approved or rejected, correct `caption`, write a `note`; then "
            f"`lorafarm dataset review {name} --import {escape(str(export))}`"
        )
    elif table is None:
        _print_queue(queue, console)
    _print_bound(queue, console)
    return imported is None or not imported.conflicts


def _print_imported(done: ImportedReviews, console: Console) -> None:
    console.print(f"[green]✓[/] {done.reviews} reviews and {done.edits} edits taken in")
    for conflict in done.conflicts:
        console.print(f"  [yellow]not taken[/] {escape(conflict.picture)}: {conflict.reason}")


def _print_queue(queue: Queue, console: Console) -> None:
    chosen = set(queue.sample)
    waiting = [one for one in queue.items if one.image in chosen and one.state == "open"]
    listed = Table("picture", "risk", "why", "caption", box=None, pad_edge=False)
    for item in waiting[:SHOWN_CAPTIONS]:
        row = (item.source, f"{item.risk:g}", item.why, item.caption)
        listed.add_row(*map(escape, row))
    console.print(listed)
    if len(waiting) > SHOWN_CAPTIONS:
        console.print(f"[dim]and {len(waiting) - SHOWN_CAPTIONS} more; --export lists all[/]")


def _print_bound(queue: Queue, console: Console) -> None:
    total, size = len(queue.items), len(queue.sample)
    line = f"{queue.read} of {size} to read are read, {queue.bad} bad; {total} captions in all."
    if queue.read == size:
        bound = bad_rate_bound(total, size, queue.bad)
        line += f" With {CONFIDENCE:.0%} confidence at most {bound:.0%} of all are bad."
    else:
        # The riskiest are read first, so half a sample is no sample and gives no bound.
        bound = bad_rate_bound(total, size)
        line += (
            f" Once all {size} are read and none is bad: at most {bound:.0%} of all are bad "
            f"({CONFIDENCE:.0%} confidence)."
        )
    console.print(line)
    if queue.bad and size < total:
        console.print("[yellow]a bad one in the sample: read more, or all[/]")

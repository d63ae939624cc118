"""`lorafarm dataset review`: which captions to read first, and a spreadsheet to do it in."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from captioning import (
    CONFIDENCE,
    Character,
    Embedder,
    EmbedderConfig,
    Queue,
    UserError,
    bad_rate_bound,
    caption_all,
    import_table,
    kept_images,
    load_character,
    load_observations,
    review_queue,
    to_table,
    write_atomic,
)
from services.cli.progress import Display
from services.datasets.steps import observers_of
from services.farm.settings import Home

SHOWN_CAPTIONS = 20  # in the terminal; --export gives all of the sample


def review_captions(
    home: Home,
    name: str,
    export: Path | None,
    table: Path | None,
    compare: bool,
    console: Console,
) -> int:
    """Import, then export or show; 0, or 2 when rows of the imported table are in conflict."""
    character = load_character(home.store, name)
    conflicts = 0
    if table is not None:
        done = import_table(home.store, character, _read(table))
        if done.edits:
            caption_all(home.store, character)
        conflicts = len(done.conflicts)
        console.print(f"[green]✓[/] {done.reviews} reviews and {done.edits} edits taken in")
        for conflict in done.conflicts:
            console.print(f"  [yellow]not taken[/] {escape(conflict.picture)}: {conflict.reason}")
    queue = _compared(home, character, console) if compare else review_queue(home.store, character)
    if export is not None:
        write_atomic(export, to_table(queue))
        console.print(
            f"[green]✓[/] {len(queue.sample)} captions to read: {escape(str(export))}\n"
            "  set `state` to approved or rejected, correct `caption`, write a `note`; then "
            f"`lorafarm dataset review {name} --import {escape(str(export))}`"
        )
    elif table is None:
        _print_queue(queue, console)
    _print_bound(queue, console)
    return 2 if conflicts else 0


def _compared(home: Home, character: Character, console: Console) -> Queue:
    """The queue, with captions compared to pictures where these have been embedded."""
    images = kept_images(home.store, character.name)
    sources = [one.source for one in observers_of(home.settings) if isinstance(one, EmbedderConfig)]
    seen = (one for image in images for one in load_observations(home.store, image.sha256))
    if not sources or all(one.embedding is None for one in seen):
        return review_queue(home.store, character)
    with Display(console) as display, display.step("captions compared with pictures") as step:
        embedder = Embedder(sources[0])
        return review_queue(home.store, character, embedder=embedder, progress=step.advance_to)


def _read(table: Path) -> bytes:
    try:
        return table.read_bytes()
    except OSError as error:
        raise UserError(str(table), error.strerror or "not readable", "check the path") from error


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
        # The riskiest are read first: half a sample is none, and gives no bound.
        bound = bad_rate_bound(total, size)
        line += (
            f" Once all {size} are read and none is bad: at most {bound:.0%} of all are bad "
            f"({CONFIDENCE:.0%} confidence)."
        )
    console.print(line)
    if queue.bad and size < total:
        console.print("[yellow]a bad one in the sample: read more, or all[/]")

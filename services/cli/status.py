"""Shows what the farm holds: characters with their datasets, and registered adapters."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from services.report.farm_status import FarmStatus


def print_status(status: FarmStatus, console: Console) -> None:
    """Print two tables, or what to do next where there is nothing to show."""
    console.print(f"[bold]{status.path}[/]")
    if not status.characters:
        console.print("empty. Next: lorafarm dataset add <name> <folder> --trigger <word>")
        return
    table = Table("character", "pictures", "newest dataset version", "train", "holdout")
    for character in status.characters:
        newest = character.newest
        table.add_row(
            character.name,
            str(character.pictures),
            newest.name if newest else "[dim]none yet[/]",
            str(len(newest.train)) if newest else "",
            str(len(newest.holdout)) if newest else "",
        )
    console.print(table)
    if status.adapters is None:
        console.print("no sweep yet. Next: lorafarm sweep <character>")
        return
    adapters = Table("adapter", "version", "aliases", "trial", "step", "identity")
    for adapter in status.adapters:
        adapters.add_row(
            adapter.name,
            str(adapter.version),
            ", ".join(adapter.aliases),
            adapter.trial,
            str(adapter.step),
            adapter.identity,
        )
    console.print(adapters)

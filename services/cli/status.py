"""`lorafarm status`: what the farm holds, in one look."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from captioning import list_characters, list_dataset_versions, load_images
from services.farm.settings import Home
from services.registry.registry import Registry


def print_status(home: Home, console: Console) -> None:
    """Print characters with pictures, versions and trials, then the registered adapters."""
    store = home.store
    names = list_characters(store)
    console.print(f"[bold]{home.path}[/]")
    if not names:
        console.print("empty. Next: lorafarm dataset add <name> <folder> --trigger <word>")
        return
    table = Table("character", "pictures", "newest dataset version", "train", "holdout")
    for name in names:
        versions = list_dataset_versions(store, name)
        newest = versions[-1] if versions else None
        table.add_row(
            name,
            str(len(load_images(store, name))),
            newest.name if newest else "[dim]none yet[/]",
            str(len(newest.train)) if newest else "",
            str(len(newest.holdout)) if newest else "",
        )
    console.print(table)
    if home.settings.tracking_uri is None and not (home.path / "mlflow.db").exists():
        console.print("no sweep yet. Next: lorafarm sweep <character>")
        return
    registry = Registry(home.tracking_uri, home.artifacts)
    adapters = Table("adapter", "version", "aliases", "trial", "step", "identity")
    for adapter in registry.list():
        adapters.add_row(
            adapter.name,
            str(adapter.version),
            ", ".join(adapter.aliases),
            adapter.trial,
            str(adapter.step),
            adapter.identity,
        )
    console.print(adapters)

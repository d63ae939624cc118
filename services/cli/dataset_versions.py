"""Shows what was done with dataset versions: compared, exported, pushed, pulled."""

from __future__ import annotations

from collections.abc import Sized

from rich.console import Console
from rich.markup import escape

from captioning import Sample, marked
from services.datasets.versions import (
    ComparedVersions,
    ExportedDataset,
    PulledDataset,
    PushedDataset,
)

SHOWN_CAPTIONS = 50  # changed ones; a rule that changes all of 5,000 is seen in the first
_MARKS = {"same": "{}", "out": "[red]\\[-{}-][/]", "in": "[green]{{+{}+}}[/]"}


def print_comparison(compared: ComparedVersions, console: Console) -> None:
    """Pictures in and out, settings, models, and changed captions word by word."""
    old, new, diff = compared.before, compared.after, compared.diff
    console.print(f"[bold]{old.character}/{old.name} → {new.character}/{new.name}[/]")
    _list(console, "in", diff.images_in, "[green]+[/]")
    _list(console, "out", diff.images_out, "[red]-[/]")
    _list(console, "held out now", diff.to_holdout, "→")
    _list(console, "trained on now", diff.to_train, "→")
    for setting in diff.settings:
        values = escape(f"{setting.before!r} → {setting.after!r}")
        console.print(f"{setting.name}: {values}")
    for mark, models in (("[green]+[/]", diff.models_in), ("[red]-[/]", diff.models_out)):
        for used in models:
            console.print(f"{mark} {used.kind} by {escape(used.model)} at {used.revision}")
    if diff.captions:
        console.print(f"{_counted(diff.captions, 'caption')} changed:")
    for change in diff.captions[:SHOWN_CAPTIONS]:
        line = marked([(kind, escape(text)) for kind, text in change.pieces], _MARKS)
        console.print(f"  [bold]{escape(change.source)}[/]: {line}")
    if len(diff.captions) > SHOWN_CAPTIONS:
        console.print(f"  and {len(diff.captions) - SHOWN_CAPTIONS} more")
    console.print(f"{compared.unchanged} pictures with the same caption")


def print_exported(exported: ExportedDataset, console: Console) -> None:
    """Where the export is, and what the other trainer has to be told."""
    version = exported.dataset
    console.print(
        f"[green]✓[/] {version.character}/{version.name} for {exported.form}: "
        f"{len(version.train)} pictures in {escape(str(exported.folder))}; "
        f"{len(version.holdout)} held out stay out",
        soft_wrap=True,
    )
    if exported.form == "ai-toolkit":
        console.print(f"  set `trigger_word: {version.trigger}` in its config")


def print_pushed(pushed: PushedDataset, console: Console) -> None:
    """How many files moved."""
    console.print(f"  {pushed.summary}", markup=False)


def print_pulled(pulled: PulledDataset, console: Console) -> None:
    """What was fetched."""
    console.print(f"  {pulled.summary}", markup=False)


def _list(console: Console, what: str, samples: tuple[Sample, ...], mark: str) -> None:
    if samples:
        console.print(f"{_counted(samples, 'picture')} {what}:")
    for sample in samples:
        console.print(f"  {mark} {escape(sample.source)}  [dim]{sample.sha256[:12]}[/]")


def _counted(things: Sized, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"

"""Shows captions that people changed: one that was edited, and imported ones put to use."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from services.datasets.captions import EditedCaption, UsedCaptions


def print_change(change: EditedCaption, console: Console) -> None:
    """The caption before and after."""
    console.print(f"[dim]before[/] {escape(change.before)}", soft_wrap=True)
    console.print(f"[green]after[/]  {escape(change.after)}", soft_wrap=True)


def print_used_captions(used: UsedCaptions, name: str, console: Console) -> None:
    """Each imported caption that is used now, and what to do next."""
    for edit in used.edits:
        console.print(f"  {escape(used.sources[edit.image])}: {escape(edit.value)}")
    captions = "imported caption" if len(used.edits) == 1 else "imported captions"
    console.print(f"[green]✓[/] {name}: {len(used.edits)} {captions} used now, as edits")
    if used.rendered:
        console.print("  the captions are rendered again")
    elif used.edits:
        console.print(f"  next: lorafarm dataset caption {name}")

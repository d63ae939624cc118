"""Shows what came of intake, captioning and freezing, and what a dataset holds."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.datasets.overview import DatasetOverview, PictureState
from services.datasets.steps import AddedPictures, CaptionedPictures, FrozenDataset


def print_added(added: AddedPictures, console: Console) -> None:
    """The number of pictures, every file that was skipped or used in part, and the captions."""
    report = added.report
    twice = f", {report.duplicates} exact duplicates merged" if report.duplicates else ""
    console.print(f"  {len(report.images)} pictures{twice}, {len(report.skipped)} skipped")
    for skipped in report.skipped:
        console.print(f"  [yellow]skipped[/] {escape(skipped.source)}: {escape(skipped.reason)}")
    for note in report.notes:
        console.print(f"  [yellow]note[/] {escape(note.source)}: {escape(note.reason)}")
    if added.with_captions:
        console.print(
            f"  {added.with_captions} of them came with a caption, kept as imported; "
            f"`lorafarm dataset use-captions {added.character.name}` uses them"
        )


def print_captioned(done: CaptionedPictures, console: Console) -> None:
    """The number of captions of each character, and the pictures that a model failed on."""
    for name, captions in done.captions.items():
        console.print(f"  {name}: {len(captions)} captions, trigger first")
    for failure in done.failures:
        console.print(f"  [yellow]not observed[/] {escape(str(failure))}")


def print_frozen(frozen: FrozenDataset, console: Console) -> None:
    """The version, and how many steps guides advise for it."""
    dataset, advised = frozen.dataset, frozen.advised
    console.print(
        f"[green]✓[/] {dataset.character}: dataset {dataset.name}, {len(dataset.train)} pictures "
        f"to train on, {len(dataset.holdout)} held out"
    )
    views = ", ".join(str(one.views) for one in advised)
    steps = ", ".join(str(one.steps) for one in advised)
    console.print(
        f"  [dim]{views} views per image are {steps} steps at batch {advised[0].batch_size}; "
        "guides disagree which is best: train to the most, score each on the way[/]"
    )


def print_overview(overview: DatasetOverview, console: Console) -> None:
    """The character, a table of its pictures, what was skipped, and the versions."""
    character = overview.character
    console.print(
        f"[bold]{character.name}[/]: trigger [bold]{escape(character.trigger)}[/], "
        f"class {escape(character.class_word)}"
    )
    table = Table("picture", "size", "caption")
    for picture in overview.pictures:
        image = picture.image
        table.add_row(escape(image.source), f"{image.width}×{image.height}", _state(picture))
    console.print(table)
    for skipped in overview.skipped:
        console.print(f"[yellow]skipped[/] {escape(skipped.source)}: {escape(skipped.reason)}")
    for version in overview.versions:
        console.print(
            f"version {version.name}: {len(version.train)} train, {len(version.holdout)} holdout"
        )


def _state(picture: PictureState) -> str:
    """The caption, or why there is none."""
    if picture.dropped is not None:
        why = picture.dropped.reason or picture.dropped.code
        return f"[yellow]dropped[/] by {escape(picture.dropped.by)}: {escape(why)}"
    return "[dim]not captioned yet[/]" if picture.caption is None else escape(picture.caption)

"""Dataset versions compared, exported and shared: `dataset diff`, `export`, `push`, `pull`.

Thin: the captioning room does the work, this file shows it to a person.
"""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from captioning import (
    Character,
    DatasetVersion,
    ExportFormat,
    Rules,
    Sample,
    UserError,
    VersionDiff,
    add_character,
    caption_all,
    diff_versions,
    export_version,
    find_dataset,
    latest_dataset,
    list_characters,
    list_dataset_versions,
    load_captions,
    load_character,
    load_images,
    marked,
    open_objects,
    parse_config,
    pull_version,
    push_version,
    use_imported,
)
from services.cli.progress import Display
from services.farm.settings import SETTINGS_FILE, Home

SHOWN_CAPTIONS = 50  # changed ones; a rule that changes all of 5,000 is seen in the first
_MARKS = {"same": "{}", "out": "[red]\\[-{}-][/]", "in": "[green]{{+{}+}}[/]"}


def show_diff(home: Home, before: str, after: str, console: Console) -> VersionDiff:
    """Print what changed from the version `before` to the version `after` (`aya@v2`)."""
    old, new = find_dataset(home.store, before), find_dataset(home.store, after)
    diff = diff_versions(old, new)
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
    stayed = len(new.train) + len(new.holdout) - len(diff.images_in)
    console.print(f"{stayed - len(diff.captions)} pictures with the same caption")
    return diff


def _list(console: Console, what: str, samples: tuple[Sample, ...], mark: str) -> None:
    if samples:
        console.print(f"{_counted(samples, 'picture')} {what}:")
    for sample in samples:
        console.print(f"  {mark} {escape(sample.source)}  [dim]{sample.sha256[:12]}[/]")


def _counted(things: Sized, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def export_dataset(
    home: Home, reference: str, form: ExportFormat, to: Path, views: int | None, console: Console
) -> Path:
    """Write a version for another trainer."""
    version = find_dataset(home.store, reference)
    folder = export_version(version, to, form, views)
    console.print(
        f"[green]✓[/] {version.character}/{version.name} for {form}: {len(version.train)} pictures "
        f"in {escape(str(folder))}; {len(version.holdout)} held out stay out",
        soft_wrap=True,
    )
    if form == "ai-toolkit":
        console.print(f"  set `trigger_word: {version.trigger}` in its config")
    return folder


def newest_dataset(home: Home, character: str, console: Console) -> DatasetVersion:
    """The newest version here; when there is none, the newest in the settings' store, fetched."""
    if home.settings.dataset_store and not list_dataset_versions(home.store, character):
        return pull_dataset(home, character, home.settings.dataset_store, console)
    return latest_dataset(home.store, character)


def push_dataset(home: Home, reference: str, to: str | None, console: Console) -> None:
    """Put a version into a bucket or folder, that of the settings when none is named."""
    version = find_dataset(home.store, reference)
    objects = open_objects(to or _usual_store(home, "--to"))
    title = f"{version.character}/{version.name} pushed to {escape(objects.url)}"
    with Display(console) as display, display.step(title) as step:
        moved = push_version(version, objects, step.advance_to)
    console.print(f"  {moved.sent} files sent and read back, {moved.present} were there")


def pull_dataset(
    home: Home, reference: str, source: str | None, console: Console
) -> DatasetVersion:
    """Fetch a version from a bucket or folder; a character that is not known yet becomes known."""
    objects = open_objects(source or _usual_store(home, "--from"))
    title = f"{reference} pulled from {escape(objects.url)}"
    with Display(console) as display, display.step(title) as step:
        version, moved = pull_version(reference, objects, home.store, step.advance_to)
    if version.character not in list_characters(home.store):
        rules = parse_config(Rules, dict(version.rules), f"{version.path}: rules")
        character = Character(
            name=version.character,
            trigger=version.trigger,
            class_word=version.class_word,
            rules=rules,
        )
        add_character(home.store, character)
    console.print(
        f"  {version.character}/{version.name}: {moved.sent} files fetched and verified, "
        f"{moved.present} were here; {len(version.train)} pictures to train on, "
        f"{len(version.holdout)} held out"
    )
    return version


def _usual_store(home: Home, option: str) -> str:
    if home.settings.dataset_store is None:
        raise UserError(
            "dataset store",
            "none is named",
            f"give {option}, or set `dataset_store` in {home.path / SETTINGS_FILE}",
        )
    return home.settings.dataset_store


def use_captions(home: Home, name: str, console: Console) -> int:
    """Make captions that came with the pictures the captions used, as edits; gives how many."""
    store = home.store
    edits = use_imported(store, name)
    sources = {image.sha256: image.source for image in load_images(store, name)}
    for edit in edits:
        console.print(f"  {escape(sources[edit.image])}: {escape(edit.value)}")
    console.print(f"[green]✓[/] {name}: {_counted(edits, 'imported caption')} used now, as edits")
    if edits and load_captions(store, name):
        caption_all(store, load_character(store, name))
        console.print("  the captions are rendered again")
    elif edits:
        console.print(f"  next: lorafarm dataset caption {name}")
    return len(edits)

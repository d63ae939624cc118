"""The dataset commands: pictures taken in, captioned through Ray Serve, frozen into a version.

Thin: the captioning room does the work, this file shows it to a person.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from captioning import (
    STARTER_CAPTIONER,
    STARTER_CLIP,
    STARTER_TAGGER,
    CaptionerConfig,
    DatasetVersion,
    Decision,
    EmbedderConfig,
    IntakeReport,
    ObservationsFailed,
    ObserverConfig,
    QualityConfig,
    TaggerConfig,
    UserError,
    add_character,
    caption_all,
    curation_findings,
    decide,
    find_image,
    freeze,
    kept_images,
    list_dataset_versions,
    load_captions,
    load_character,
    load_decisions,
    load_images,
    load_overrides,
    load_skipped,
    make_character,
    observe,
    require_passable,
    serve_observers,
    take_in,
)
from services.cli.progress import Display
from services.datasets.check import curation_limits
from services.datasets.versions import push_dataset
from services.farm.settings import Home, Settings


def add_pictures(
    home: Home,
    name: str,
    pictures: Path | list[Path],
    trigger: str,
    class_word: str,
    console: Console,
    captions: Literal["keep", "ignore"] = "keep",
) -> IntakeReport:
    """Make or find the character `name` and take in `pictures`: folders, ZIP archives, files."""
    character = make_character(name, trigger, class_word)
    with Display(console) as display, display.step(f"{name}: pictures taken in") as step:
        report = take_in(pictures, home.store, character, step.advance_to, captions)
    add_character(home.store, character)
    twice = f", {report.duplicates} exact duplicates merged" if report.duplicates else ""
    console.print(f"  {len(report.images)} pictures{twice}, {len(report.skipped)} skipped")
    for skipped in report.skipped:
        console.print(f"  [yellow]skipped[/] {escape(skipped.source)}: {escape(skipped.reason)}")
    for note in report.notes:
        console.print(f"  [yellow]note[/] {escape(note.source)}: {escape(note.reason)}")
    if report.imported:
        named = len({caption.sha256 for caption in report.imported})
        console.print(
            f"  {named} of them came with a caption, kept as imported; "
            f"`lorafarm dataset use-captions {name}` uses them"
        )
    return report


def caption_pictures(home: Home, names: list[str], console: Console) -> None:
    """Observe and caption the pictures of the characters `names`; Ray must be running.

    A picture on which a model failed does not hold up the others: it is told at the end, or raised
    as UserError when a caption lacks what the model should have said.
    """
    store = home.store
    pictures = {name: kept_images(store, name) for name in names}
    characters = {name: load_character(store, name) for name in names}
    failures = []
    with Display(console) as display, ExitStack() as serving:
        with display.step("captioning models started on Ray Serve"):
            client = serving.enter_context(serve_observers(observers_of(home.settings)))
        for name in names:
            with display.step(f"{name}: pictures observed") as step:
                try:
                    observe(pictures[name], store, client, step.advance_to)
                except ObservationsFailed as failure:
                    failures.append(failure)
    try:
        for name in names:
            captions = caption_all(store, characters[name])
            console.print(f"  {name}: {len(captions)} captions, trigger first")
    except UserError as error:
        raise (failures[0] if failures else error) from error
    for told in failures:
        console.print(f"  [yellow]not observed[/] {escape(str(told))}")


def observers_of(settings: Settings) -> tuple[ObserverConfig, ...]:
    """The models that look at the pictures: those of the settings, or the usual four."""
    if settings.observers is not None:
        return settings.observers
    return (
        TaggerConfig(source=str(settings.tagger or STARTER_TAGGER)),
        CaptionerConfig(source=str(settings.captioner or STARTER_CAPTIONER)),
        EmbedderConfig(source=str(settings.embedder or STARTER_CLIP)),
        QualityConfig(),
    )


def freeze_dataset(home: Home, name: str, holdout: float, console: Console) -> DatasetVersion:
    """Freeze the captioned pictures of the character `name`."""
    from training import ADVISED_VIEWS, Recipe, steps_for_views  # heavy: torch

    character = load_character(home.store, name)
    # Lint blocks inside freeze; what pictures need depends on the base, which the farm knows.
    found = curation_findings(home.store, character, curation_limits(home))
    require_passable(home.store, name, found, load_overrides(home.store, name))
    counts = Counter(finding.code for finding in found)
    dataset = freeze(home.store, character, holdout, findings=counts)
    console.print(
        f"[green]✓[/] {name}: dataset {dataset.name}, {len(dataset.train)} pictures to train on, "
        f"{len(dataset.holdout)} held out"
    )
    recipe = Recipe()
    steps = [str(steps_for_views(views, recipe, len(dataset.train))) for views in ADVISED_VIEWS]
    console.print(
        f"  [dim]{', '.join(map(str, ADVISED_VIEWS))} views per image are {', '.join(steps)} steps "
        f"at batch {recipe.batch_size}; guides disagree which is best: train to the most, score "
        "each on the way[/]"
    )
    if home.settings.dataset_store:
        push_dataset(home, f"{name}@{dataset.name}", home.settings.dataset_store, console)
    return dataset


def decide_picture(
    home: Home, name: str, picture: str, keep: bool, reason: str, console: Console
) -> None:
    """Drop one picture from the versions made from now on, or take it back in."""
    image = find_image(home.store, name, picture)
    decide(home.store, name, [Decision(image=image.sha256, keep=keep, reason=reason)])
    left = len(kept_images(home.store, name))
    console.print(
        f"[green]✓[/] {image.source} is {'kept' if keep else 'dropped'}; {left} pictures in"
    )


def show_dataset(home: Home, name: str, console: Console) -> None:
    """Print the character's pictures with captions, what was skipped, and the versions."""
    store = home.store
    character = load_character(store, name)
    captions = load_captions(store, name)
    console.print(
        f"[bold]{name}[/]: trigger [bold]{character.trigger}[/], class {character.class_word}"
    )
    decisions = load_decisions(store, name)
    table = Table("picture", "size", "caption")
    for image in load_images(store, name):
        caption = captions.get(image.sha256, "[dim]not captioned yet[/]")
        decision = decisions.get(image.sha256)
        if decision is not None and not decision.keep:
            caption = f"[yellow]dropped[/] by {decision.by}: {decision.reason or decision.code}"
        table.add_row(image.source, f"{image.width}×{image.height}", caption)
    console.print(table)
    for skipped in load_skipped(store, name):
        console.print(f"[yellow]skipped[/] {skipped.source}: {skipped.reason}")
    for version in list_dataset_versions(store, name):
        console.print(
            f"version {version.name}: {len(version.train)} train, {len(version.holdout)} holdout"
        )

"""The steps from pictures to a dataset version: take in, caption through Ray Serve, freeze.

The captioning room does the work; this file joins it to the farm's settings and tells of progress.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from captioning import (
    STARTER_CAPTIONER,
    STARTER_CLIP,
    STARTER_TAGGER,
    CaptionerConfig,
    Character,
    DatasetVersion,
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
    freeze,
    kept_images,
    list_version_names,
    load_character,
    load_overrides,
    make_character,
    observe,
    require_passable,
    serve_observers,
    take_in,
)
from services.datasets.check import curation_limits
from services.datasets.versions import PushedDataset, push_dataset
from services.farm.progress import UNWATCHED, Progress
from services.farm.settings import Home, Settings
from training import ADVISED_VIEWS, Recipe, steps_for_views


@dataclass(frozen=True)
class AddedPictures:
    """What one intake brought to a character."""

    character: Character
    report: IntakeReport  # pictures, files that were skipped, captions that came with pictures

    @property
    def with_captions(self) -> int:
        """How many pictures came with a caption."""
        return len({caption.sha256 for caption in self.report.imported})


@dataclass(frozen=True)
class CaptionedPictures:
    """The captions of one or several characters, and what the models failed on."""

    captions: dict[str, dict[str, str]]  # by character's name, then by picture's sha256
    failures: tuple[ObservationsFailed, ...]  # each names a model and the pictures it failed on


@dataclass(frozen=True)
class AdvisedSteps:
    """A number of training steps in which every picture is seen so often."""

    views: int  # of each picture
    steps: int
    batch_size: int


@dataclass(frozen=True)
class FrozenDataset:
    """A dataset version that was frozen, or found frozen already."""

    dataset: DatasetVersion
    existed: bool  # the same pictures and captions had been frozen before
    advised: tuple[AdvisedSteps, ...]  # what guides advise, fewest steps first
    pushed: PushedDataset | None  # None when the settings name no store for datasets


def add_pictures(
    home: Home,
    name: str,
    sources: Path | Sequence[Path],
    trigger: str,
    class_word: str,
    captions: Literal["keep", "ignore"] = "keep",
    progress: Progress = UNWATCHED,
) -> AddedPictures:
    """Make or find the character `name` and take in its pictures; nothing given is changed.

    The `sources` are folders, ZIP archives and picture files. Captions beside the pictures are
    kept as imported, or ignored. Raises UserError, with nothing written, for a path that is
    missing, a source without pictures, or another trigger than the character has.
    """
    character = make_character(name, trigger, class_word)
    with progress.step(f"{name}: pictures taken in") as step:
        report = take_in(sources, home.store, character, step.advance_to, captions)
    add_character(home.store, character)
    return AddedPictures(character, report)


def caption_pictures(
    home: Home, names: Iterable[str], progress: Progress = UNWATCHED
) -> CaptionedPictures:
    """Observe and caption the pictures of the characters `names`; Ray must be running.

    Only pictures that a model has not seen yet are sent to it. A picture on which a model failed
    does not hold up the others: the failure is in the result, or it is raised as UserError when a
    caption lacks what the model should have said.
    """
    store = home.store
    pictures = {name: kept_images(store, name) for name in names}
    characters = {name: load_character(store, name) for name in pictures}
    failures = []
    with ExitStack() as serving:
        with progress.step("captioning models started on Ray Serve"):
            client = serving.enter_context(serve_observers(observers_of(home.settings)))
        for name, images in pictures.items():
            with progress.step(f"{name}: pictures observed") as step:
                try:
                    observe(images, store, client, step.advance_to)
                except ObservationsFailed as failure:
                    failures.append(failure)
    try:
        captions = {name: caption_all(store, one) for name, one in characters.items()}
    except UserError as error:
        raise (failures[0] if failures else error) from error
    return CaptionedPictures(captions, tuple(failures))


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


def freeze_dataset(
    home: Home, name: str, holdout: float, progress: Progress = UNWATCHED
) -> FrozenDataset:
    """Freeze the captioned pictures of the character `name`, or find the equal version.

    The share `holdout` of the pictures is kept out of training, for scoring. A new version is
    pushed to the store that the settings name, if they name one. Raises UserError when pictures
    have no caption yet, or a finding blocks that nobody has overridden.
    """
    character = load_character(home.store, name)
    # Lint blocks inside freeze; what pictures need depends on the base, which the farm knows.
    found = curation_findings(home.store, character, curation_limits(home))
    require_passable(home.store, name, found, load_overrides(home.store, name))
    known = list_version_names(home.store, name)
    counts = Counter(finding.code for finding in found)
    dataset = freeze(home.store, character, holdout, findings=counts)
    pushed = None
    if home.settings.dataset_store:
        # Said before the push, which may fail and leaves a frozen version here.
        progress.say(f"{name}: frozen as {dataset.name}")
        pushed = push_dataset(home, f"{name}@{dataset.name}", home.settings.dataset_store, progress)
        progress.say(pushed.summary)
    return FrozenDataset(dataset, dataset.name in known, _advised(len(dataset.train)), pushed)


def _advised(pictures: int) -> tuple[AdvisedSteps, ...]:
    recipe = Recipe()
    return tuple(
        AdvisedSteps(views, steps_for_views(views, recipe, pictures), recipe.batch_size)
        for views in ADVISED_VIEWS
    )

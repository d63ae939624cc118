"""Dataset versions compared, exported, pushed to a store and pulled from it.

The captioning room does the work; this file knows which store the farm's settings name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from captioning import (
    Character,
    DatasetVersion,
    ExportFormat,
    Rules,
    Transfer,
    UserError,
    VersionDiff,
    add_character,
    diff_versions,
    export_version,
    find_dataset,
    latest_dataset,
    list_characters,
    list_version_names,
    open_objects,
    parse_config,
    pull_version,
    push_version,
)
from services.farm.progress import UNWATCHED, Progress
from services.farm.settings import SETTINGS_FILE, Home


@dataclass(frozen=True)
class ComparedVersions:
    """Two versions of one character and what differs between them."""

    before: DatasetVersion
    after: DatasetVersion
    diff: VersionDiff

    @property
    def unchanged(self) -> int:
        """How many pictures are in both with the same caption."""
        pictures = len(self.after.train) + len(self.after.holdout)
        return pictures - len(self.diff.images_in) - len(self.diff.captions)


@dataclass(frozen=True)
class ExportedDataset:
    """A version whose training pictures were written for another trainer."""

    dataset: DatasetVersion
    form: ExportFormat
    folder: Path


@dataclass(frozen=True)
class PushedDataset:
    """A version that is in a store now."""

    dataset: DatasetVersion
    url: str  # of the store
    transfer: Transfer  # how many files were sent, and how many were there

    @property
    def summary(self) -> str:
        """A line that counts the files that were sent and those that were there."""
        return f"{self.transfer.sent} files sent and read back, {self.transfer.present} were there"


@dataclass(frozen=True)
class PulledDataset:
    """A version that was fetched from a store and verified."""

    dataset: DatasetVersion
    url: str  # of the store
    transfer: Transfer  # how many files were fetched, and how many were here

    @property
    def summary(self) -> str:
        """A line that counts the files fetched, and the pictures of the version."""
        dataset, moved = self.dataset, self.transfer
        return (
            f"{dataset.character}/{dataset.name}: {moved.sent} files fetched and verified, "
            f"{moved.present} were here; {len(dataset.train)} pictures to train on, "
            f"{len(dataset.holdout)} held out"
        )


def compare_versions(home: Home, before: str, after: str) -> ComparedVersions:
    """What changed from the version `before` to the version `after` (`aya@v2`)."""
    old, new = find_dataset(home.store, before), find_dataset(home.store, after)
    return ComparedVersions(old, new, diff_versions(old, new))


def export_dataset(
    home: Home, reference: str, form: ExportFormat, to: Path, views: int | None = None
) -> ExportedDataset:
    """Write the training pictures and captions of a version to the folder `to`.

    `views` is how often kohya's trainer shows each picture in an epoch. Raises UserError when the
    folder holds anything that an earlier export did not write there.
    """
    version = find_dataset(home.store, reference)
    return ExportedDataset(version, form, export_version(version, to, form, views))


def push_dataset(
    home: Home, reference: str, to: str | None = None, progress: Progress = UNWATCHED
) -> PushedDataset:
    """Put a version (`aya@v2`) into the bucket or folder `to`, or that of the settings.

    Raises UserError when no store is named, or bytes came back from it changed.
    """
    version = find_dataset(home.store, reference)
    objects = open_objects(to or _usual_store(home, "--to"))
    with progress.step(f"{version.character}/{version.name} pushed to {objects.url}") as step:
        moved = push_version(version, objects, step.advance_to)
    return PushedDataset(version, objects.url, moved)


def pull_dataset(
    home: Home, reference: str, source: str | None = None, progress: Progress = UNWATCHED
) -> PulledDataset:
    """Fetch a version from the bucket or folder `source`, or that of the settings.

    A character that is not known here yet becomes known. Raises UserError when no store is named,
    it has no such version, or a file is missing or changed there.
    """
    objects = open_objects(source or _usual_store(home, "--from"))
    with progress.step(f"{reference} pulled from {objects.url}") as step:
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
    return PulledDataset(version, objects.url, moved)


def newest_dataset(home: Home, character: str, progress: Progress = UNWATCHED) -> DatasetVersion:
    """The newest version here; when there is none, the newest in the settings' store, fetched."""
    if home.settings.dataset_store and not list_version_names(home.store, character):
        pulled = pull_dataset(home, character, home.settings.dataset_store, progress)
        progress.say(pulled.summary)
        return pulled.dataset
    return latest_dataset(home.store, character)


def _usual_store(home: Home, option: str) -> str:
    if home.settings.dataset_store is None:
        raise UserError(
            "dataset store",
            "none is named",
            f"give {option}, or set `dataset_store` in {home.path / SETTINGS_FILE}",
        )
    return home.settings.dataset_store

"""What a character's dataset holds: its pictures, what was skipped, the versions made so far."""

from __future__ import annotations

from dataclasses import dataclass

from captioning import (
    Character,
    DatasetVersion,
    Decision,
    Image,
    Skipped,
    list_dataset_versions,
    load_captions,
    load_character,
    load_decisions,
    load_images,
    load_skipped,
)
from services.farm.settings import Home


@dataclass(frozen=True)
class PictureState:
    """One picture of a character, as it stands now."""

    image: Image
    caption: str | None  # None before captioning
    dropped: Decision | None  # the decision that left it out, if one did


@dataclass(frozen=True)
class DatasetOverview:
    """All that is known of a character's dataset."""

    character: Character
    pictures: tuple[PictureState, ...]  # in the order of intake
    skipped: tuple[Skipped, ...]  # files that were no pictures, each with the reason
    versions: tuple[DatasetVersion, ...]  # oldest first


def describe_dataset(home: Home, name: str) -> DatasetOverview:
    """What the dataset of the character `name` holds; nothing is changed."""
    store = home.store
    character = load_character(store, name)
    captions, decisions = load_captions(store, name), load_decisions(store, name)
    pictures = []
    for image in load_images(store, name):
        decision = decisions.get(image.sha256)
        dropped = decision if decision is not None and not decision.keep else None
        pictures.append(PictureState(image, captions.get(image.sha256), dropped))
    return DatasetOverview(
        character,
        tuple(pictures),
        tuple(load_skipped(store, name)),
        tuple(list_dataset_versions(store, name)),
    )

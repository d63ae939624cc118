"""What the farm holds, in one look: characters with their datasets, and registered adapters.

A home in, plain values out. What the farm holds is left as it is and nothing is shown here; the
list of adapters may be kept in a file, so that the next look at it is fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from captioning import DatasetVersion, list_characters, list_dataset_versions, load_images
from services.farm.settings import Home
from services.registry.bundle import AdapterVersion
from services.registry.listing import registered_adapters


@dataclass(frozen=True)
class CharacterStatus:
    """One character of the farm."""

    name: str
    pictures: int
    newest: DatasetVersion | None  # None: nothing was frozen yet


@dataclass(frozen=True)
class FarmStatus:
    """The farm."""

    path: Path
    characters: tuple[CharacterStatus, ...]
    adapters: tuple[AdapterVersion, ...] | None  # None: no sweep has made the registry yet


def farm_status(home: Home) -> FarmStatus:
    """Look the farm up in its store and its registry."""
    store = home.store
    characters = []
    for name in list_characters(store):
        versions = list_dataset_versions(store, name)
        newest = versions[-1] if versions else None
        characters.append(CharacterStatus(name, len(load_images(store, name)), newest))
    has_registry = home.settings.tracking_uri is not None or (home.path / "mlflow.db").exists()
    adapters = None
    if characters and has_registry:
        adapters = registered_adapters(home.tracking_uri, home.artifacts)
    return FarmStatus(home.path, tuple(characters), adapters)

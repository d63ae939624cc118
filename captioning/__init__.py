"""Pictures in, an immutable captioned dataset version out. Imports nothing of the other rooms."""

from pathlib import Path

from captioning.captions import caption_all, load_captions
from captioning.character import (
    Character,
    add_character,
    list_characters,
    load_character,
    make_character,
)
from captioning.config import load_config, parse_config
from captioning.dataset import (
    DatasetVersion,
    Sample,
    freeze,
    latest_dataset,
    list_dataset_versions,
    load_dataset,
)
from captioning.decode import PictureError, upright_rgb
from captioning.errors import UserError
from captioning.intake import (
    Image,
    IntakeReport,
    Skipped,
    load_images,
    load_skipped,
    take_in,
)
from captioning.observations import Observation, ObserverClient, load_observations, observe
from captioning.observers.embedder import Embedder
from captioning.rules import Rules, intrinsic_tags, render
from captioning.serving import serve_observers
from captioning.store import BlobStore, Store, content_hash, sync_directory, write_atomic

_STARTER = Path(__file__).parent / "starter"
STARTER_TAGGER = _STARTER / "tagger"
STARTER_CAPTIONER = _STARTER / "captioner"
STARTER_CLIP = _STARTER / "clip"

__all__ = [
    "STARTER_CAPTIONER",
    "STARTER_CLIP",
    "STARTER_TAGGER",
    "BlobStore",
    "Character",
    "DatasetVersion",
    "Embedder",
    "Image",
    "IntakeReport",
    "Observation",
    "ObserverClient",
    "PictureError",
    "Rules",
    "Sample",
    "Skipped",
    "Store",
    "UserError",
    "add_character",
    "caption_all",
    "content_hash",
    "freeze",
    "intrinsic_tags",
    "latest_dataset",
    "list_characters",
    "list_dataset_versions",
    "load_captions",
    "load_character",
    "load_config",
    "load_dataset",
    "load_images",
    "load_observations",
    "load_skipped",
    "make_character",
    "observe",
    "parse_config",
    "render",
    "serve_observers",
    "sync_directory",
    "take_in",
    "upright_rgb",
    "write_atomic",
]

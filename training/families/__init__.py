"""Base model families: `load_base` picks the family by the model's own index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from captioning import UserError
from training.families.base import (
    INDEX_FILE,
    STARTER_BASE,
    Base,
    hash_components,
    read_json,
    resolve_folder,
)
from training.families.stable_diffusion import (
    COMPONENTS,
    PIPELINE_CLASSES,
    StableDiffusionBase,
    check_files,
)

__all__ = [
    "STARTER_BASE",
    "Base",
    "BaseFacts",
    "base_facts",
    "base_hash",
    "load_base",
    "native_size_px",
]


@dataclass(frozen=True)
class BaseFacts:
    """What names a base model without loading it."""

    source: str  # path or hub id
    content_hash: str
    family: str


def load_base(
    path_or_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Base:
    """Load a base model, frozen, with its UNet in `dtype`, from a diffusers folder or a hub id.

    Raises UserError naming the file and the fix when it is no such model, when a file is missing
    or broken, or when only pickled weights are there.
    """
    folder = _checked_folder(path_or_id)
    return StableDiffusionBase(str(path_or_id), folder, torch.device(device), dtype)


def base_hash(path_or_id: str | Path) -> str:
    """sha256 hex of a base's content: its configs, tokenizer and safetensors.

    The same files give the same hash wherever they lie. Reads every byte (about a second per
    gigabyte), loads nothing. Raises UserError like `load_base`.
    """
    return hash_components(_checked_folder(path_or_id), COMPONENTS)


def base_facts(path_or_id: str | Path) -> BaseFacts:
    """Hash and family of a base, checked like `load_base` but not loaded."""
    return BaseFacts(str(path_or_id), base_hash(path_or_id), StableDiffusionBase.family)


def native_size_px(path_or_id: str | Path) -> int:
    """The side of the pictures that a base was trained on, px; loads no weights.

    Raises UserError like `load_base`.
    """
    folder = _checked_folder(path_or_id)
    sample = int(read_json(folder / "unet" / "config.json")["sample_size"])
    # The VAE halves the picture between two of its blocks.
    halvings = len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1
    return sample * 2**halvings


def _checked_folder(path_or_id: str | Path) -> Path:
    folder = resolve_folder(path_or_id)
    pipeline = read_json(folder / INDEX_FILE).get("_class_name")
    if pipeline not in PIPELINE_CLASSES:
        raise UserError(
            f"{folder / INDEX_FILE}: _class_name",
            f"{pipeline!r} is not a Stable Diffusion 1.x/2.x text-to-image pipeline",
            "use a base whose model_index.json says StableDiffusionPipeline",
        )
    check_files(folder)
    return folder

"""Base model families: `load_base` picks the family by the model's own index."""

from __future__ import annotations

from pathlib import Path

import torch

from captioning import UserError
from training.families.base import Base, Conditions
from training.families.conversion import converted
from training.families.files import (
    INDEX_FILE,
    check_files,
    hash_components,
    read_json,
    resolve_folder,
)
from training.families.flux import FluxBase
from training.families.flux2 import Flux2Base
from training.families.qwen_image import QwenImageBase
from training.families.sd3 import SD3Base
from training.families.sdxl import SDXLBase
from training.families.single_file import spelled
from training.families.stable_diffusion import StableDiffusionBase
from training.families.z_image import ZImageBase
from training.family_facts import BaseFacts

__all__ = [
    "FAMILIES",
    "Base",
    "Conditions",
    "absolute_base",
    "base_facts",
    "base_hash",
    "family_of",
    "load_base",
    "native_size_px",
    "size_multiple_px",
]

#: The families' classes by name.
FAMILIES: dict[str, type[Base]] = {
    kind.family: kind
    for kind in (
        StableDiffusionBase,
        SDXLBase,
        SD3Base,
        FluxBase,
        Flux2Base,
        ZImageBase,
        QwenImageBase,
    )
}


def load_base(
    path_or_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Base:
    """Load a base model, frozen, its denoiser in `dtype`.

    From a diffusers folder, a hub id, or a single-file checkpoint: `file.safetensors`, or
    `file.safetensors@config` where `config` is the folder or hub id that has what the file lacks.
    On `meta`, denoiser and CLIP encoders are made from their configs alone: they have layers and
    shapes, and no weights are read.
    Raises UserError naming the file and the fix when it is no such model, when a file is missing
    or broken, or when only pickled weights are there.
    """
    folder, kind = _checked(path_or_id)
    single = spelled(path_or_id)
    name = str(path_or_id if single is None else single.file)
    return kind(name, folder, torch.device(device), dtype)


def base_hash(path_or_id: str | Path) -> str:
    """sha256 hex of a base's content: its configs, tokenizers and safetensors.

    The same files give the same hash wherever they lie. Reads every byte (about a second per
    gigabyte), loads nothing. Raises UserError like `load_base`.
    """
    folder, kind = _checked(path_or_id)
    return hash_components(folder, kind.components)


def base_facts(path_or_id: str | Path) -> BaseFacts:
    """Hash and family of a base, checked like `load_base` but not loaded."""
    folder, kind = _checked(path_or_id)
    return BaseFacts(str(path_or_id), hash_components(folder, kind.components), kind.family)


def family_of(path_or_id: str | Path) -> type[Base]:
    """The family of a base, by its index; reads no weights. Raises UserError like `load_base`."""
    return _checked(path_or_id)[1]


def native_size_px(path_or_id: str | Path) -> int:
    """The side of the pictures that a base was trained on, px; loads no weights.

    Raises UserError like `load_base`.
    """
    folder, kind = _checked(path_or_id)
    return kind.native_size(folder)


def size_multiple_px(path_or_id: str | Path) -> int:
    """What the sides of a base's pictures must be multiples of, px; loads no weights.

    Raises UserError like `load_base`.
    """
    folder, kind = _checked(path_or_id)
    return kind.size_multiple(folder)


def absolute_base(path_or_id: str) -> str:
    """The same base from any working directory; a hub id stays as it is."""
    single = spelled(path_or_id)
    if single is not None:
        return str(single.absolute())
    folder = Path(path_or_id).expanduser()
    return str(folder.resolve()) if folder.exists() else path_or_id


def _checked(path_or_id: str | Path) -> tuple[Path, type[Base]]:
    single = spelled(path_or_id)
    folder = resolve_folder(path_or_id) if single is None else converted(single, FAMILIES)
    pipeline = read_json(folder / INDEX_FILE).get("_class_name")
    for kind in FAMILIES.values():
        if pipeline in kind.pipelines:
            absent = [name for name in kind.optional if not (folder / name).is_dir()]
            check_files(folder, tuple(name for name in kind.components if name not in absent))
            return folder, kind
    known = ", ".join(name for kind in FAMILIES.values() for name in kind.pipelines)
    raise UserError(
        f"{folder / INDEX_FILE}: _class_name",
        f"{pipeline!r} is of no family that can be trained",
        f"use a base whose model_index.json says one of: {known}",
    )

"""A base model's folder in diffusers layout: found, checked, hashed, and its parts loaded.

A path or hub id in, a checked folder, its hash and its networks out. Reads safetensors only, never
a pickle, and never writes into a model's folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from captioning import UserError, no_progress_bars

INDEX_FILE = "model_index.json"
# The file names with which diffusers saves denoisers and VAEs, and transformers text encoders.
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The files that are fetched from the hub: no pickles, second precisions or single-file copies.
_HUB_ALLOW = ["*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.safetensors", "*/*.model", "*/*.jinja"]
_HUB_IGNORE = ["*.fp16.safetensors", "*.non_ema.safetensors", "safety_checker/*"]
_HASH_CHUNK_BYTES = 1 << 20


def resolve_folder(path_or_id: str | Path) -> Path:
    """The local folder of a base: the path itself, or the hub's snapshot of `owner/name`.

    Raises UserError if there is no such folder, if it is not a diffusers layout, or if the hub
    has no such model or cannot be reached while no copy is cached.
    """
    path = Path(path_or_id).expanduser()
    if not path.is_dir():
        if isinstance(path_or_id, Path) or not _HUB_ID.fullmatch(path_or_id):
            raise UserError(
                str(path_or_id),
                "no such folder",
                "give the folder of a model in diffusers layout, a .safetensors checkpoint, or a "
                "hub id such as owner/name",
            )
        path = _download(path_or_id)
    if not (path / INDEX_FILE).is_file():
        raise UserError(
            str(path / INDEX_FILE),
            "is missing, so this is no model in diffusers layout",
            "give the folder that holds model_index.json and the subfolders that it names",
        )
    return path


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            hub_id, allow_patterns=_HUB_ALLOW, ignore_patterns=_HUB_IGNORE, max_workers=4
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            hub_id,
            f"is no local folder, and it could not be had from the hub ({reason})",
            "check the spelling and the network, or give the path of a local copy",
        ) from error
    return Path(folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder; UserError naming the file if it is missing or broken."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            str(path), "is missing", "complete the model's folder (save_pretrained writes it)"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            str(path), f"is not readable JSON ({error})", "download or save the model again"
        ) from error
    if not isinstance(data, dict):
        raise UserError(
            str(path), f"holds a {type(data).__name__}, not an object", "save the model again"
        )
    return data


def hash_components(folder: Path, components: tuple[str, ...]) -> str:
    """sha256 hex over the names and bytes of configs, tokenizers, chat templates and safetensors.

    Pickles and other files in the folder are left out: they are never loaded. A unet's file and
    the same file elsewhere give the same hash, wherever the model's folder lies.
    """
    digest = hashlib.sha256()
    files = [
        path
        for component in components
        for path in (folder / component).rglob("*")
        if path.suffix in {".json", ".txt", ".safetensors", ".model", ".jinja"} and path.is_file()
    ]
    for path in sorted(files, key=lambda file: file.relative_to(folder).as_posix()):
        content = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                content.update(chunk)
        digest.update(f"{path.relative_to(folder).as_posix()}\n{content.hexdigest()}\n".encode())
    return digest.hexdigest()


def check_files(folder: Path, components: tuple[str, ...]) -> None:
    """Raise UserError for the first component whose config or safetensors file is missing."""
    for component in components:
        if component == "scheduler":
            read_json(folder / component / "scheduler_config.json")
        elif not component.startswith("tokenizer"):
            read_json(folder / component / "config.json")
    for component in components:
        stem = _weight_stem(component)
        if stem is not None and _weight_variant(folder / component, stem) is None:
            pickles = sorted((folder / component).glob("*.bin"))
            found = f"only {pickles[0].name}, a pickle, is there" if pickles else "is missing"
            raise UserError(
                str(folder / component / f"{stem}.safetensors"),
                found,
                "save the model as safetensors (save_pretrained(..., safe_serialization=True)); "
                "pickles can run code and are never loaded"
                if pickles
                else "complete the model's folder; its download may have been cut off",
            )
        if component.startswith("tokenizer") and not any((folder / component).glob("*.json")):
            raise UserError(
                str(folder / component),
                "holds no vocabulary",
                f"complete the model's folder with the files of {component}/",
            )


def _weight_stem(component: str) -> str | None:
    """The stem of a component's weight file; None if it has no weights."""
    if component.startswith("text_encoder"):
        return TRANSFORMERS_STEM
    return DIFFUSERS_STEM if component in {"unet", "transformer", "vae"} else None


def has_weights(folder: Path, component: str) -> bool:
    """Whether a model's folder holds safetensors of this network."""
    stem = _weight_stem(component)
    return stem is not None and _weight_variant(folder / component, stem) is not None


def _weight_variant(folder: Path, stem: str) -> str | None:
    """'' for plain weights, 'fp16' if only those are there, None if there are none."""
    for variant in ("", "fp16"):
        dotted = f"{stem}.{variant}" if variant else stem
        index = f"{stem}.safetensors.index.{variant}" if variant else f"{stem}.safetensors.index"
        if (folder / f"{dotted}.safetensors").is_file() or (folder / f"{index}.json").is_file():
            return variant
    return None


def load_network(
    kind: Any, folder: Path, component: str, dtype: torch.dtype, device: torch.device
) -> Any:
    """One frozen network from its subfolder, read into the host's memory, then put on `device`.

    On `meta` it is made from its config alone: no weights are read, and only its layers and their
    shapes are known. Raises UserError naming the folder when it cannot be read.
    """
    stem = _weight_stem(component)
    if stem is None:
        raise ValueError(f"{component} has no weights")
    with naming_the_folder(folder / component), no_progress_bars():
        if device.type == "meta":
            network = _shapes_alone(kind, folder, component)
            # diffusers' own `to` warns about layers to keep in fp32, also where there are none.
            torch.nn.Module.to(network, dtype)
            return network.requires_grad_(False).eval()
        network = kind.from_pretrained(
            folder,
            subfolder=component,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            variant=_weight_variant(folder / component, stem) or None,
        )
    return network.requires_grad_(False).eval().to(device)


def _shapes_alone(kind: Any, folder: Path, component: str) -> Any:
    """A network of diffusers or transformers, by its config, without memory for its weights."""
    place: dict[str, Any] = {"subfolder": component, "local_files_only": True}
    if hasattr(kind, "load_config"):  # diffusers
        config = kind.load_config(folder, **place)
        with torch.device("meta"):
            return kind.from_config(config)
    config = kind.config_class.from_pretrained(folder, **place)
    with torch.device("meta"):
        return kind(config)


def language_model_dtype(device: torch.device) -> torch.dtype:
    """The type that text encoders larger than CLIP's are held in: fp32 on a CPU, else bf16.

    In fp32 a T5-XXL has 19 GB, and in fp16 its activations overflow.
    """
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load_part(kind: Any, folder: Path, component: str, **options: Any) -> Any:
    """A tokenizer or a scheduler from its subfolder; errors as from `load_network`."""
    with naming_the_folder(folder / component):
        return kind.from_pretrained(folder, subfolder=component, local_files_only=True, **options)


@contextmanager
def naming_the_folder(folder: Path) -> Iterator[None]:
    """Turn what the model libraries raise on broken files into a UserError that names them."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            str(folder),
            f"could not be loaded ({lines[0]})",
            "download or save the model again; its files may be cut off or of another family",
        ) from error

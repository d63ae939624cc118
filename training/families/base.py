"""What every base model family offers to training, sampling and export.

A folder or hub id in, a frozen `Base` out, with the same methods in every family. The weights of a
base are never changed; adapters are put on and taken off by `training.adapters`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioning import UserError

STARTER_BASE: Path = Path(__file__).resolve().parent.parent / "starter"
INDEX_FILE = "model_index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What is fetched from the hub: no pickles, no second precision, no single-file copies.
_HUB_ALLOW = ["*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.safetensors", "*/*.model"]
_HUB_IGNORE = ["*.fp16.safetensors", "*.non_ema.safetensors", "safety_checker/*"]
_HASH_CHUNK_BYTES = 1 << 20


class Base(ABC):
    """A frozen base model: its networks, its noise schedule and the sizes that follow from them.

    `unet` is kept in `dtype` (fp32 on CPU, half on CUDA), the encoders always in fp32. Pixels are
    in -1..1, model latents are the VAE's after shift and scale.
    """

    id: str  # the path or hub id as the person gave it
    folder: Path
    family: str
    device: torch.device
    dtype: torch.dtype
    native_size_px: int
    latent_channels: int
    vae_factor: int  # pixels per latent cell along one side
    prediction_type: str  # "epsilon" or "v_prediction"
    unet: Any
    tokenizer: Any
    scheduler: Any  # DDPM with the base's own betas

    #: Subfolders that make up the base; everything else in its folder is ignored.
    components: tuple[str, ...]

    @cached_property
    def content_hash(self) -> str:
        """sha256 over all files that make the base what it is, see `base_hash`."""
        return hash_components(self.folder, self.components)

    @cached_property
    def encoder_hash(self) -> str:
        """sha256 over the VAE, the text encoder and the tokenizer: what cached latents rest on."""
        return hash_components(self.folder, tuple(c for c in self.components if c != "unet"))

    @cached_property
    @abstractmethod
    def vae(self) -> Any:
        """The VAE, frozen, on the base's device; loaded when it is asked for."""

    @cached_property
    @abstractmethod
    def text_encoder(self) -> Any:
        """The text encoder, frozen, on the base's device; loaded when it is asked for."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Text embeddings, fp32 on the base's device.  # (N, T, C)"""

    @abstractmethod
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The VAE's posterior of (N, 3, H, W) pixels in -1..1: mean and log-variance, fp32.

        Raw values of the VAE; `to_latents` turns a sample of it into the model's latents.
        # 2 x (N, C, h, w)
        """

    @abstractmethod
    def to_latents(self, posterior_sample: Tensor) -> Tensor:
        """Shift and scale a sample of the VAE's posterior as the UNet expects it."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in about -1..1, fp32, of the model's latents (N, C, h, w)."""

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The UNet's output (noise or v) for noisy latents, fp32.  # (N, C, h, w)

        `timesteps` is (N,) int64 in 0..T-1, `text` is (N, T, C).
        """

    def release_encoders(self) -> None:
        """Free the VAE and the text encoder, on CUDA and on a CPU; training needs neither.

        Whoever asks for one again has it loaded again. On two cores the starter's VAE takes about
        0.1 s and its text encoder 0.05 s, and the pictures of one scored checkpoint, which need the
        VAE alone once their prompts are embedded, 21 s: too little to keep a copy in the host's
        memory for, where every worker would have one (FLUX's T5 takes 19 GB in fp32).
        """
        for name in ("vae", "text_encoder"):
            self.__dict__.pop(name, None)
        gc.collect()  # what is in a cycle would stay until the collector's next round


def resolve_folder(path_or_id: str | Path) -> Path:
    """The local folder of a base: the path itself, or the hub's snapshot of `owner/name`.

    Raises UserError if there is no such folder, if it is not a diffusers layout, or if the hub
    has no such model or cannot be reached while no copy is cached.
    """
    path = Path(path_or_id).expanduser()
    if path.is_file():
        raise UserError(
            str(path),
            "is a single file, not a folder in diffusers layout",
            "convert it once: StableDiffusionPipeline.from_single_file(file)"
            ".save_pretrained(folder), then give the folder",
        )
    if not path.is_dir():
        if isinstance(path_or_id, Path) or not _HUB_ID.fullmatch(path_or_id):
            raise UserError(
                str(path_or_id),
                "no such folder",
                "give the folder of a model in diffusers layout, or a hub id such as owner/name",
            )
        path = _download(path_or_id)
    if not (path / INDEX_FILE).is_file():
        raise UserError(
            str(path / INDEX_FILE),
            "is missing, so this is no model in diffusers layout",
            "give the folder that holds model_index.json, unet/, vae/, text_encoder/, tokenizer/ "
            "and scheduler/",
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
    """sha256 hex over the names and bytes of the configs, tokenizer files and safetensors.

    Pickles and other files in the folder are left out: they are never loaded. A unet's file and
    the same file elsewhere give the same hash, wherever the model's folder lies.
    """
    digest = hashlib.sha256()
    files = [
        path
        for component in components
        for path in (folder / component).rglob("*")
        if path.suffix in {".json", ".txt", ".safetensors", ".model"} and path.is_file()
    ]
    for path in sorted(files, key=lambda file: file.relative_to(folder).as_posix()):
        content = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                content.update(chunk)
        digest.update(f"{path.relative_to(folder).as_posix()}\n{content.hexdigest()}\n".encode())
    return digest.hexdigest()

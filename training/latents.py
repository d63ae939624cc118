"""Everything frozen about a dataset, computed once: VAE posteriors and text embeddings.

A dataset version and a base in, a `LatentCache` out, stored under a key of all that went in, so
that every trial of every sweep on the same inputs shares it. Never trains, never edits a picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Picture
from PIL import ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from captioning import DatasetVersion, Sample, UserError, upright_rgb, write_atomic
from training.families import Base

# Part of every key: raise it when the pixels or tensors below come out differently.
FORMAT = 1
TENSORS_FILE = "latents.safetensors"
INDEX_FILE = "index.json"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LatentCache:
    """What training needs of N pictures; fp32 on the CPU. F is 2 with mirrored pictures, else 1."""

    key: str
    mean: Tensor  # (N, F, C, h, w), the VAE's raw posterior
    logvar: Tensor  # (N, F, C, h, w)
    text: Tensor  # (N, T, D), embeddings of the captions
    empty_text: Tensor  # (T, D), embedding of the empty caption


def encode_dataset(
    dataset: DatasetVersion,
    base: Base,
    resolution: int | None,
    flip: bool,
    folder: Path,
    progress: Progress | None = None,
) -> LatentCache:
    """Encode the training pictures of `dataset`, or read what an earlier call left in `folder`.

    Pictures are turned upright, scaled so that the short side is `resolution` pixels (the base's
    native size when None) and cropped to the centre square. `folder/<key>/` gets the tensors and
    an index; it appears whole or not at all. Raises UserError for a resolution that the VAE cannot
    divide, a dataset without training pictures, or a picture that cannot be read.
    """
    size_px = resolution or base.native_size_px
    if size_px % base.vae_factor:
        raise UserError(
            "recipe: resolution",
            f"{size_px} px is not a multiple of the VAE's factor {base.vae_factor}",
            f"use {max(1, round(size_px / base.vae_factor)) * base.vae_factor}",
        )
    if not dataset.train:
        raise UserError(
            str(dataset.path),
            "the dataset version holds no training picture",
            "add pictures, or freeze it with a smaller holdout share",
        )
    index = {
        "format": FORMAT,
        "encoders": base.encoder_hash,
        "size_px": size_px,
        "flip": flip,
        "dtype": "float32",
        "samples": [[sample.sha256, sample.caption] for sample in dataset.train],
    }
    key = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()[:32]
    cached = _read(folder / key, key)
    if cached is not None:
        if progress:
            progress(len(dataset.train), len(dataset.train))
        return cached
    return _encode(dataset.train, base, size_px, flip, index, folder / key, progress)


def _encode(
    samples: tuple[Sample, ...],
    base: Base,
    size_px: int,
    flip: bool,
    index: dict[str, object],
    target: Path,
    progress: Progress | None,
) -> LatentCache:
    means, logvars, texts = [], [], []
    # One picture at a time: the numbers do not depend on who shares the batch.
    for done, sample in enumerate(samples, start=1):
        pixels = read_pixels(sample.path, size_px)
        views = [pixels, pixels.flip(-1)] if flip else [pixels]
        posteriors = [base.encode_pixels(view[None]) for view in views]
        means.append(torch.cat([mean.cpu() for mean, _ in posteriors]))  # (F, C, h, w)
        logvars.append(torch.cat([logvar.cpu() for _, logvar in posteriors]))
        texts.append(base.encode_prompts([sample.caption])[0].cpu())  # (T, D)
        if progress:
            progress(done, len(samples))
    tensors = {
        "mean": torch.stack(means).contiguous(),
        "logvar": torch.stack(logvars).contiguous(),
        "text": torch.stack(texts).contiguous(),
        "empty_text": base.encode_prompts([""])[0].cpu().contiguous(),
    }
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            base.id,
            f"its encoders gave values that are not finite ({', '.join(broken)})",
            "the model's files are damaged: download or save it again",
        )
    write_atomic(target / TENSORS_FILE, save(tensors))
    # The index is written last: a folder without it is not there yet.
    write_atomic(target / INDEX_FILE, json.dumps(index, indent=1).encode())
    # From the file, like every later reader: the pages are shared, and the copies above are freed.
    return LatentCache(key=target.name, **load_file(target / TENSORS_FILE))


def _read(folder: Path, key: str) -> LatentCache | None:
    """The cache in `folder`; None when it is absent or unreadable (it is then made again).

    `load_file` maps the file: nothing is read before it is used, and all workers of a machine share
    the pages.
    """
    if not (folder / INDEX_FILE).is_file():
        return None
    try:
        tensors = load_file(folder / TENSORS_FILE)
    except (OSError, SafetensorError):
        return None
    return LatentCache(key=key, **tensors)


def read_pixels(path: Path, size_px: int) -> Tensor:
    """The centre square of a picture, `size_px` wide, in -1..1.  # (3, H, W) fp32

    Turned by its EXIF orientation; transparency is laid on white. Raises UserError if the file
    cannot be decoded.
    """
    try:
        picture = upright_rgb(path.read_bytes())
    except (OSError, ValueError, SyntaxError, Picture.DecompressionBombError) as error:
        raise UserError(
            str(path), f"cannot be read as a picture ({error})", "freeze the dataset again"
        ) from error
    picture = ImageOps.fit(picture, (size_px, size_px), Picture.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32))  # (H, W, 3)
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1.0

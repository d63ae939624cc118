"""Everything frozen about a dataset, computed once: VAE posteriors and text embeddings.

A dataset version (or other samples) and a base in, a `LatentCache` out, stored under a key of all
that went in, so that every trial of every sweep on the same inputs shares it. Never trains, never
edits a picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from captioning import DatasetVersion, Sample, UserError, write_atomic
from training.data.buckets import BucketLimits, Size, crop_sizes
from training.data.captions import CaptionPlan, tag_orders, without_trigger
from training.data.crop import read_crop
from training.families import Base

# Part of every key: raise it when the pixels or tensors below come out differently.
FORMAT = 2
TENSORS_FILE = "latents.safetensors"
INDEX_FILE = "index.json"
# The prefixes of the four groups of tensors in the file.
TEXT, EMPTY_TEXT, PRIOR_TEXT, PICTURE = "text.", "empty_text.", "prior_text.", "picture."
# The prefix of one bucket's tensors, by its number; without buckets they have no prefix.
BUCKET = "bucket.{:04d}."
IMAGES = "images"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Bucket:
    """The n pictures of one size; fp32 on the CPU. F is 2 with mirrored pictures, else 1."""

    images: tuple[int, ...]  # which of the cache's pictures they are, ascending
    mean: Tensor  # (n, F, C, h, w), the VAE's raw posterior
    logvar: Tensor  # (n, F, C, h, w)
    mask: Tensor  # (n, F, 1, h, w), how much of each cell's picture is opaque, 0..1


@dataclass(frozen=True)
class LatentCache:
    """What training needs to know about N pictures; fp32 on the CPU."""

    key: str
    buckets: tuple[Bucket, ...]  # ascending by size; one if all pictures are squares
    text: dict[str, Tensor]  # (N, V, ...) each, of the captions with their tags in V orders
    empty_text: dict[str, Tensor]  # (...) each, of the empty caption
    prior_text: dict[str, Tensor]  # (N, ...) each, of the captions without the trigger, or empty
    picture: dict[str, Tensor]  # (N, ...) each, what the denoiser is told of the pictures
    # The captions behind `text` (N times V) and `prior_text`, for text encoders that are trained.
    captions: tuple[tuple[str, ...], ...] = ()
    prior_captions: tuple[str, ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """How many pictures each bucket holds."""
        return tuple(len(bucket.images) for bucket in self.buckets)

    @property
    def orders(self) -> int:
        """V, the number of orders in which each caption's tags are there."""
        return next(iter(self.text.values())).shape[1]

    def conditions(self, image: int, order: int | None = 0) -> dict[str, Tensor]:
        """The conditions of one picture with its caption in that order; None: an empty caption."""
        said = self.empty_text
        if order is not None:
            said = {name: tensor[image, order] for name, tensor in self.text.items()}
        return {**said, **self._of_picture(image)}

    def prior_conditions(self, image: int) -> dict[str, Tensor]:
        """The conditions with the caption without the trigger; empty if that was not encoded."""
        said = {name: tensor[image] for name, tensor in self.prior_text.items()}
        return {**said, **self._of_picture(image)} if said else {}

    def _of_picture(self, image: int) -> dict[str, Tensor]:
        return {name: tensor[image] for name, tensor in self.picture.items()}


def encode_dataset(
    dataset: DatasetVersion,
    base: Base,
    resolution: int | None,
    flip: bool,
    folder: Path,
    progress: Progress | None = None,
    captions: CaptionPlan | None = None,
    limits: BucketLimits | None = None,
) -> LatentCache:
    """`encode_samples` of the training pictures of `dataset`.

    Raises UserError as it does, and for a dataset without training pictures.
    """
    if not dataset.train:
        raise UserError(
            str(dataset.path),
            "the dataset version holds no training picture",
            "add pictures, or freeze it with a smaller holdout share",
        )
    return encode_samples(
        dataset.train, base, resolution, flip, folder, progress, captions, dataset.trigger, limits
    )


def encode_samples(
    samples: Sequence[Sample],
    base: Base,
    resolution: int | None,
    flip: bool,
    folder: Path,
    progress: Progress | None = None,
    captions: CaptionPlan | None = None,
    trigger: str = "",
    limits: BucketLimits | None = None,
) -> LatentCache:
    """Encode pictures with their captions, or read what an earlier call left in `folder`.

    Pictures are turned upright, scaled and cropped to the centre square of `resolution` pixels (the
    base's native size when None), or each to its bucket within `limits`; captions as `captions`
    says, by default as they are. `folder/<key>/` gets the tensors and an index; it appears whole or
    not at all. Raises UserError for a resolution that the VAE cannot divide, limits without
    buckets, or a picture that cannot be read.
    """
    captions = captions or CaptionPlan()
    size_px = resolution or base.native_size_px
    sizes = crop_sizes(size_px, base.size_multiple_px, limits)
    index: dict[str, object] = {
        "format": FORMAT,
        "encoders": base.encoder_hash,
        "size_px": size_px,
        "flip": flip,
        "dtype": "float32",
        "captions": asdict(captions),
        "trigger": trigger if captions.without_trigger else None,
        "samples": [[sample.sha256, sample.caption] for sample in samples],
    }
    if limits is not None:
        index["sizes"] = sizes  # with each picture's own size they decide its bucket
    if base.text_dtype != torch.float32:  # on a GPU, say, where encoders round more
        index["text_dtype"] = str(base.text_dtype).removeprefix("torch.")
    key = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()[:32]
    cache = _read(folder / key, key)
    if cache is None:
        cache = _encode(
            samples, base, sizes, flip, captions, trigger, index, folder / key, progress
        )
    elif progress:
        progress(len(samples), len(samples))
    of_anybody = samples if captions.without_trigger else ()
    return replace(
        cache,
        captions=tuple(tag_orders(s.caption, captions.orders, captions.kept) for s in samples),
        prior_captions=tuple(without_trigger(s.caption, trigger) for s in of_anybody),
    )


def _encode(
    samples: Sequence[Sample],
    base: Base,
    sizes: Sequence[Size],
    flip: bool,
    captions: CaptionPlan,
    trigger: str,
    index: dict[str, object],
    target: Path,
    progress: Progress | None,
) -> LatentCache:
    by_size: dict[Size, list[dict[str, Tensor]]] = {}
    texts, priors, pictures = [], [], []
    # One picture at a time: the numbers do not depend on who shares the batch.
    for number, sample in enumerate(samples):
        crop = read_crop(sample.path, sizes)
        views = [crop.pixels, crop.pixels.flip(-1)] if flip else [crop.pixels]
        posteriors = [base.encode_pixels(view[None]) for view in views]
        mean = torch.cat([mean.cpu() for mean, _ in posteriors])  # (F, C, h, w)
        by_size.setdefault(crop.size, []).append(
            {
                IMAGES: torch.tensor(number),
                "mean": mean,
                "logvar": torch.cat([logvar.cpu() for _, logvar in posteriors]),
                "mask": _cell_masks(crop.opacity, mean, flip),
            }
        )
        # The captions are encoded one at a time too.
        orders = tag_orders(sample.caption, captions.orders, captions.kept)
        texts.append(_stacked([_first(base.encode_prompts([order])) for order in orders]))
        if captions.without_trigger:
            anybody = without_trigger(sample.caption, trigger)
            priors.append(_first(base.encode_prompts([anybody])))
        pictures.append(base.picture_conditions(crop.original, crop.corner, crop.size))
        if progress:
            progress(number + 1, len(samples))
    tensors = {
        **_of_buckets([_stacked(by_size[size]) for size in sorted(by_size)], len(sizes) > 1),
        **_named(TEXT, _stacked(texts)),
        **_named(PRIOR_TEXT, _stacked(priors)),
        **_named(EMPTY_TEXT, _first(base.encode_prompts([""]))),
        **_named(PICTURE, _stacked(pictures)),
    }
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            base.id,
            f"its encoders gave values that are not finite ({', '.join(broken)})",
            "the model's files are damaged: download or save it again",
        )
    write_atomic(target / TENSORS_FILE, save(tensors))
    # The index is written last: a folder without it counts as not there.
    write_atomic(target / INDEX_FILE, json.dumps(index, indent=1).encode())
    # Read from the file, like every later reader: pages are shared, and the copies above are freed.
    return _cache(target.name, load_file(target / TENSORS_FILE))


def _of_buckets(buckets: Sequence[Mapping[str, Tensor]], named: bool) -> dict[str, Tensor]:
    """The buckets' tensors by their names in the file."""
    if not named:  # without buckets, one has all pictures, and its tensors have no prefix
        (only,) = buckets
        return {name: tensor for name, tensor in only.items() if name != IMAGES}
    return {
        name: tensor
        for number, bucket in enumerate(buckets)
        for name, tensor in _named(BUCKET.format(number), bucket).items()
    }


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
    return _cache(key, tensors)


def _cache(key: str, tensors: Mapping[str, Tensor]) -> LatentCache:
    groups = {
        prefix: {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        for prefix in (TEXT, EMPTY_TEXT, PRIOR_TEXT, PICTURE)
    }
    return LatentCache(
        key=key,
        buckets=_buckets(tensors),
        text=groups[TEXT],
        empty_text=groups[EMPTY_TEXT],
        prior_text=groups[PRIOR_TEXT],
        picture=groups[PICTURE],
    )


def _buckets(tensors: Mapping[str, Tensor]) -> tuple[Bucket, ...]:
    def bucket(prefix: str, images: Sequence[int]) -> Bucket:
        parts = (tensors[prefix + name] for name in ("mean", "logvar", "mask"))
        return Bucket(tuple(images), *parts)

    if "mean" in tensors:
        return (bucket("", range(len(tensors["mean"]))),)
    prefixes = sorted(name.removesuffix(IMAGES) for name in tensors if name.endswith(IMAGES))
    return tuple(bucket(prefix, tensors[prefix + IMAGES].tolist()) for prefix in prefixes)


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}


def _first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[0].cpu() for name, tensor in tensors.items()}


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _cell_masks(opacity: Tensor, mean: Tensor, flip: bool) -> Tensor:
    """The mean opacity of the pixels of each latent cell; with `flip` also mirrored.

    # (H, W), (F, C, h, w) -> (F, 1, h, w)
    """
    views = torch.stack([opacity, opacity.flip(-1)] if flip else [opacity])[:, None]
    return F.adaptive_avg_pool2d(views, (mean.shape[-2], mean.shape[-1]))

"""The encoded pictures that a sweep's trials learn from: the dataset and sets of class pictures.

A job's recipes in, latent caches out, each in memory once for all trials that can share it.
"""

from __future__ import annotations

from pathlib import Path

from captioning import DatasetVersion, Store, UserError, load_class_pictures, load_dataset
from training.data.buckets import BucketLimits
from training.data.captions import CaptionPlan
from training.data.class_pictures import class_samples
from training.data.latents import LatentCache, encode_dataset, encode_samples
from training.events import Buckets, Encoding, OnEvent
from training.families import Base
from training.recipe import Recipe
from training.run.held_base import HeldBase
from training.run.job import SweepJob


class Encoded:
    """Latent caches that are read from the disk, or encoded, when they are first asked for."""

    def __init__(self, job: SweepJob, base: HeldBase, on_event: OnEvent) -> None:
        """`on_event` hears `Encoding` and `Buckets`."""
        self._job = job
        self._base = base
        self._send = on_event
        self._caches: dict[tuple[object, ...], LatentCache] = {}
        self._dataset: DatasetVersion | None = None

    @property
    def dataset(self) -> DatasetVersion:
        """The job's dataset version, read once."""
        if self._dataset is None:
            self._dataset = load_dataset(Path(self._job.dataset_path))
        return self._dataset

    def pictures(self, recipe: Recipe) -> LatentCache:
        """The encoded dataset; raises UserError for `masked_loss` without anything masked."""
        captions, limits = CaptionPlan.of(recipe), BucketLimits.of(recipe)
        key = recipe.resolution, recipe.flip, captions, limits
        if key not in self._caches:
            base = self._base.for_encoding(recipe)
            self._caches[key] = encode_dataset(
                self.dataset,
                base,
                recipe.resolution,
                recipe.flip,
                Path(self._job.latents_dir),
                self._tell_encoded,
                captions,
                limits,
            )
            if limits is not None:
                self._tell_buckets(self._caches[key], base)
        masks = (bucket.mask for bucket in self._caches[key].buckets)
        if recipe.masked_loss is not None and all(bool((mask == 1).all()) for mask in masks):
            raise UserError(
                "recipe: masked_loss",
                "no training picture has transparent parts",
                "leave it out, or save what is not to be learnt as transparent (PNG, WebP)",
            )
        return self._caches[key]

    def class_pictures(self, recipe: Recipe) -> LatentCache | None:
        """The encoded class pictures, if the recipe names any."""
        name = recipe.class_pictures
        if name is None:
            return None
        key = recipe.resolution, recipe.flip, name, recipe.class_prompt
        if key not in self._caches:
            if self._job.store is None:
                raise ValueError("the job does not say where class pictures are stored")
            pictures = load_class_pictures(Store(Path(self._job.store)), name)
            self._caches[key] = encode_samples(
                class_samples(pictures, recipe.class_prompt, self.dataset),
                self._base.for_encoding(recipe),
                recipe.resolution,
                recipe.flip,
                Path(self._job.latents_dir),
                self._tell_encoded,
            )
        return self._caches[key]

    def _tell_encoded(self, done: int, total: int) -> None:
        self._send(Encoding(done, total))

    def _tell_buckets(self, cache: LatentCache, base: Base) -> None:
        sides = (
            (*bucket.mean.shape[-2:], count)
            for bucket, count in zip(cache.buckets, cache.counts, strict=True)
        )
        factor = base.vae_factor
        buckets = tuple((height * factor, width * factor, count) for height, width, count in sides)
        self._send(Buckets(buckets))

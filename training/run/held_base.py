"""The one base that a worker holds in memory, in the form that the trials at hand need.

A job and a recipe in, a `Base` out: whole, quantised, or this worker's share of it; compiled and
with gradient checkpointing where the job says so.
"""

from __future__ import annotations

import gc

import torch

from training.compiled import compile_blocks
from training.families import Base, family_of
from training.frozen.quantised import load_quantised
from training.frozen.sharding import load_sharded, refuse_offloading_to_itself, worker_mesh
from training.frozen.zero import load_with_zero, release_engine
from training.precision import base_dtype
from training.recipe import Recipe
from training.run.job import SweepJob


class HeldBase:
    """Loaded when first asked for, and anew when a recipe needs another form."""

    def __init__(self, job: SweepJob, device: torch.device, world_size: int) -> None:
        """To be called by all workers of the group together."""
        self._job = job
        self._device = device
        self._mesh = worker_mesh(device, world_size) if job.strategy == "fsdp" else None
        self._base: Base | None = None

    def for_training(self, recipe: Recipe) -> Base:
        """The base in the recipe's form; the one before it is let go."""
        # Asking for the family may ask the hub: once is enough.
        half = self._base.half if self._base is not None else family_of(self._job.base).half
        dtype = base_dtype(recipe, self._device, half)
        form = recipe.base_precision
        if self._base is None or (self._base.dtype, self._base.held_as) != (dtype, form):
            self.release()
            self._base = self._load(dtype, form)
        return self._base

    def for_encoding(self, recipe: Recipe) -> Base:
        """A base whose encoders are the recipe's: they do not depend on the denoiser's form."""
        if self._job.strategy == "deepspeed" and self._base is not None:
            return self._base  # another could only be loaded by all workers together
        return self.for_training(recipe)

    def release(self) -> None:
        """Free the base's memory before another takes its place."""
        if self._base is not None:
            release_engine(self._base)
        self._base = None
        gc.collect()  # compiled and shared blocks are in cycles

    def _load(self, dtype: torch.dtype, form: str) -> Base:
        job = self._job
        place = job.base, self._device, dtype
        if job.is_shared_out and job.offload_base:
            refuse_offloading_to_itself(self._device)
        if job.strategy == "deepspeed":
            base = load_with_zero(*place, job.offload_base)
        elif self._mesh is not None:
            base = load_sharded(*place, self._mesh, job.offload_base)
        else:
            base = load_quantised(*place, form)
        if job.gradient_checkpointing:
            base.denoiser.enable_gradient_checkpointing()
        if job.compile:
            buckets = any(spec.recipe.aspect_buckets for spec in job.trials)
            compile_blocks(base, shapes_vary=buckets)
        return base

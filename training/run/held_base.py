"""The one base that a worker holds in memory, in the form that the trials at hand need.

A job and a recipe in, a `Base` out: whole, quantised, or this worker's share of it; compiled and
with gradient checkpointing where the job says so.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch

from training.compiled import compile_blocks
from training.families import Base, family_of
from training.families.compiled_blocks import CompiledBlocks
from training.frozen.quantised import load_quantised
from training.frozen.sharding import load_sharded, refuse_offloading_to_itself, worker_mesh
from training.frozen.zero import load_with_zero, release_engine
from training.precision import base_dtype
from training.recipe import Recipe
from training.run.job import SweepJob


@dataclass(frozen=True)
class _Loaded:
    """A base in memory, and what belongs to it as long as it is there."""

    base: Base
    base_precision: str  # the form of the denoiser's linear layers, see `load_quantised`
    compiled: CompiledBlocks | None
    engine: Any  # DeepSpeed's, which gathers the denoiser's weights; None with other strategies


class HeldBase:
    """The base of a worker, loaded when first asked for and when a recipe needs another form."""

    def __init__(self, job: SweepJob, device: torch.device, world_size: int) -> None:
        """To be called by all workers of the group together."""
        self._job = job
        self._device = device
        self._mesh = worker_mesh(device, world_size) if job.strategy == "fsdp" else None
        self._loaded: _Loaded | None = None

    @property
    def compiled(self) -> CompiledBlocks | None:
        """The compiled blocks of the base that is in memory now."""
        return None if self._loaded is None else self._loaded.compiled

    def for_training(self, recipe: Recipe) -> Base:
        """The base in the recipe's form; a base in another form is let go."""
        # Asking for the family may ask the hub, so it is done only once.
        half = self._loaded.base.half if self._loaded else family_of(self._job.base).half
        wanted = base_dtype(recipe, self._device, half), recipe.base_precision
        loaded = self._loaded
        if loaded is None or (loaded.base.dtype, loaded.base_precision) != wanted:
            del loaded  # before another takes its place
            self.release()
            loaded = self._loaded = self._load(*wanted)
        return loaded.base

    def for_encoding(self, recipe: Recipe) -> Base:
        """A base whose encoders are the recipe's: they do not depend on the denoiser's form."""
        if self._job.strategy == "deepspeed" and self._loaded is not None:
            return self._loaded.base  # only all workers together could load another one
        return self.for_training(recipe)

    def release(self) -> None:
        """Free the base's memory before another takes its place."""
        if self._loaded is not None and self._loaded.engine is not None:
            release_engine(self._loaded.engine)
        self._loaded = None
        gc.collect()  # compiled and shared blocks refer to themselves

    def _load(self, dtype: torch.dtype, form: str) -> _Loaded:
        job = self._job
        place = job.base, self._device, dtype
        engine = compiled = None
        if job.is_shared_out and job.offload_base:
            refuse_offloading_to_itself(self._device)
        if job.strategy == "deepspeed":
            base, engine = load_with_zero(*place, job.offload_base)
        elif self._mesh is not None:
            base = load_sharded(*place, self._mesh, job.offload_base)
        else:
            base = load_quantised(*place, form)
        if job.gradient_checkpointing:
            base.denoiser.enable_gradient_checkpointing()
        if job.compile:
            buckets = any(spec.recipe.aspect_buckets for spec in job.trials)
            compiled = compile_blocks(base, shapes_vary=buckets)
        return _Loaded(base, form, compiled, engine)

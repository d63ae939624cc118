"""What one Ray Train worker does with a sweep: encode once, then train and score pack by pack.

A `SweepJob` in; checkpoints, scores and `failed.json` files in the trials' folders out, events to
the driver. Every step finds out from the disk what is done already, so a worker that was killed
and started again just goes on. One trial's failure never ends the others.
"""

from __future__ import annotations

import functools
import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from captioning import (
    DatasetVersion,
    Store,
    UserError,
    load_class_pictures,
    load_dataset,
    write_atomic,
)
from training.adapters import cut_at, detach, load_adapter
from training.batches import samples_per_step
from training.buckets import BucketLimits
from training.captions import CaptionPlan
from training.checkpoints import (
    Checkpoint,
    begun_with,
    last_with_state,
    list_checkpoints,
    load_checkpoint,
)
from training.class_pictures import class_samples
from training.compiled import compile_blocks
from training.families import Base, family_of
from training.group import Group, Ledger
from training.latents import LatentCache, encode_dataset, encode_samples
from training.lockstep import in_step
from training.loop import base_dtype, train_pack
from training.mailbox import Event
from training.nested import write_cut
from training.pack.pack import shared_by_a_pack
from training.pack.plan import MAX_SLOTS, plan_packs
from training.pack.slot import Trial
from training.prompts import ScoringConfig
from training.quantised import BASE_PRECISIONS, load_quantised
from training.recipe import Recipe
from training.retention import drop_other_states
from training.sharding import (
    load_sharded,
    refuse_offloading_to_itself,
    refuse_quantised_shares,
    worker_mesh,
)
from training.zero import import_deepspeed, load_with_zero, release_engine

FAILED_FILE = "failed.json"
SETUP = "setup"
Strategy = Literal["ddp", "fsdp", "deepspeed"]

T = TypeVar("T")


@dataclass(frozen=True)
class TrialSpec:
    """One trial to train: its id, its recipe and its folder."""

    trial: str
    recipe: Recipe
    trial_dir: Path
    cuts: tuple[TrialSpec, ...] = ()  # of a run with nested ranks: see `cut_recipes`


@dataclass(frozen=True)
class SweepJob:
    """All that a worker group needs to know; plain values that travel between machines."""

    base: str  # path or hub id
    dataset_path: str
    latents_dir: str
    trials: tuple[TrialSpec, ...]
    scoring: ScoringConfig | None  # None: train only
    score_dir: str  # the bare base's images and scores, shared by the trials
    max_slots: int = MAX_SLOTS  # trials that are trained together at most
    gradient_checkpointing: bool = False  # activations are computed again, not kept
    compile: bool = False  # the denoiser's blocks are, in training
    keep_all_states: bool = True  # False: the optimiser's of the best and the last checkpoint
    strategy: Strategy = "ddp"  # whether every worker holds the frozen base, or its share of it
    batch_workers: int | None = None  # that batch_size is written for; None: those of the group
    offload_base: bool = False  # with shares: they lie in the host's memory
    store: str | None = None  # the farm's, which holds the sets of class pictures

    def __post_init__(self) -> None:
        """Raises UserError for a quantised base that is shared out, ValueError if compiled."""
        if self.is_shared_out:
            if self.compile:
                raise ValueError("a compiled block cannot gather its weights")
            refuse_quantised_shares(spec.recipe for spec in self.trials)

    @property
    def is_shared_out(self) -> bool:
        """Whether every worker holds its share of the frozen base."""
        return self.strategy != "ddp"


@dataclass(frozen=True)
class SetupError:
    """Why no trial could be started; `fix` is None when it is not the person's to fix."""

    where: str
    found: str
    fix: str | None


def _tried(act: Callable[[], object]) -> SetupError | None:
    try:
        act()
    except UserError as error:
        return SetupError(error.where, error.found, error.fix)
    except Exception:
        # Told to the driver with its traceback; a restart would only meet it again.
        return SetupError("training worker", traceback.format_exc(), None)
    return None


class Worker:
    """One member of the group, with the base and the encoded dataset in memory."""

    def __init__(
        self,
        job: SweepJob,
        group: Group,
        device: torch.device,
        on_event: Callable[[Event], None],
        stopped: Callable[[], bool],
        ledger: Ledger | None,
        max_deaths: int,
    ) -> None:
        """`on_event` and `ledger` are used on rank 0 only; `stopped` must be cheap to ask."""
        self.job = job
        self.group = group
        self.device = device
        self.on_event = on_event
        self.stopped = stopped
        self.ledger = ledger
        self.max_deaths = max_deaths
        # Made here, where all workers are.
        self._mesh = worker_mesh(device, group.world_size) if job.strategy == "fsdp" else None
        self._base: Base | None = None
        self._caches: dict[tuple[object, ...], LatentCache] = {}
        self._dataset: DatasetVersion | None = None
        self._embedder: Any = None
        self._base_scores: Any = None
        self._finished: set[str] = set()  # trials that were told to be

    def run(self) -> SetupError | None:
        """Train and score every trial that is not done; returns what kept all from starting."""
        problem = self._load_together()
        if problem is None:
            problem = self.group.rank_0_says(lambda: self._set_up(self._encode))
        if problem is None:
            reference = self._reference()
            problem = self._on_rank_0(
                reference, lambda: self._set_up(lambda: self._score_bare_base(reference))
            )
        if problem is not None:
            return problem
        for specs, seats in self.group.rank_0_says(self._packs):
            if not self._run_pack(specs, seats):
                return None
        return None

    def _packs(self) -> list[tuple[list[TrialSpec], int]]:
        """Trials that can share a pack, and its seats: as many as the largest planned pack has.

        Whoever leaves early gives its seat to the next. Trials that began with other samples per
        step stand apart.
        """
        workers = self.job.batch_workers or self.group.world_size
        alike: dict[tuple[object, ...], list[TrialSpec]] = {}
        for spec in self.job.trials:
            samples = begun_with(spec.trial_dir) or samples_per_step(spec.recipe, workers)
            alike.setdefault((*shared_by_a_pack(spec.recipe), samples), []).append(spec)
        packs = []
        for specs in alike.values():
            planned = plan_packs([spec.recipe for spec in specs], self.job.max_slots)
            in_order = [specs[index] for pack in planned for index in pack]
            packs.append((in_order, max(len(pack) for pack in planned)))
        return packs

    def _set_up(self, act: Callable[[], None]) -> SetupError | None:
        """Rank 0, once: do what all trials need; returns why it cannot be done."""
        self._enter(SETUP)
        if self._died_too_often(SETUP):
            return SetupError(
                "training worker",
                f"it died {self.max_deaths} times while it loaded the base and encoded the "
                "dataset (out of memory, most often)",
                "free memory, use a smaller base, or fewer workers on one machine",
            )
        return _tried(act)

    def _load_together(self) -> SetupError | None:
        """What each worker must be able to do by itself; why one of them cannot, told to all.

        To compile, or to load a base by DeepSpeed, whose workers exchange weights while they load.
        """
        if not (self.job.compile or self.job.strategy == "deepspeed"):
            return None
        # They may have died of it before.
        problem = self.group.rank_0_says(lambda: self._set_up(lambda: None))
        if problem is None and self.job.strategy == "deepspeed":
            problem = self._all_try(import_deepspeed)
        if problem is None:
            problem = self._all_try(lambda: self._base_for(self._reference()))
        return problem

    def _all_try(self, act: Callable[[], object]) -> SetupError | None:
        problems = self.group.all_say(_tried(act))
        return next((problem for problem in problems if problem is not None), None)

    def _encode(self) -> None:
        for spec in self.job.trials:
            self._cache_for(spec.recipe)
            self._class_cache_for(spec.recipe)

    def _on_rank_0(self, recipe: Recipe, act: Callable[[], T]) -> T:
        """`act()`, which may sample, computed on rank 0 and given to every rank."""
        if not self.job.is_shared_out:
            return self.group.rank_0_says(act)
        return in_step(self.group, self._base_for(recipe), act)

    def _run_pack(self, planned: Sequence[TrialSpec], seats: int) -> bool:
        """Train and score the trials, `seats` at a time; False when the driver asked to stop.

        A pack that keeps killing its worker, or fails as a whole, is tried again in halves: most
        often it was too large, and at last the trial that it fails for stands alone.
        """
        specs, too_deadly = self.group.rank_0_says(lambda: self._admit(planned))
        if too_deadly:
            return self._run_halves(planned, seats)
        if not specs:
            return True
        # With several workers only errors that all of them meet may be caught by all of them.
        survivable = Exception if self.group.world_size == 1 else UserError
        try:
            return self._train_and_score(specs, seats)
        except survivable as error:
            if self.job.is_shared_out:
                self._release_base()  # a pass that broke off leaves blocks gathered
            if len(planned) == 1:
                self._fail(planned[0], error)
                return True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._run_halves(planned, seats)

    def _run_halves(self, planned: Sequence[TrialSpec], seats: int) -> bool:
        middle, fewer = len(planned) // 2, (seats + 1) // 2
        return all(self._run_pack(half, fewer) for half in (planned[:middle], planned[middle:]))

    def _admit(self, planned: Sequence[TrialSpec]) -> tuple[list[TrialSpec], bool]:
        """Rank 0: the trials that have not failed, and whether they must be tried in halves."""
        specs = [spec for spec in planned if not (spec.trial_dir / FAILED_FILE).exists()]
        # Failed and finished members are named too, so that it stays the same pack.
        phase = " ".join(spec.trial for spec in planned)
        if specs and self._died_too_often(phase):
            if len(planned) > 1:
                return specs, True
            found = f"its worker died {self.max_deaths} times (out of memory, most often)"
            fix = "lower batch_size or resolution, and raise accumulation instead"
            self._fail(planned[0], UserError(f"trial {planned[0].trial}", found, fix))
            return [], False
        self._enter(phase)
        return specs, False

    def _train_and_score(self, specs: Sequence[TrialSpec], seats: int) -> bool:
        """Of trials that share packs of `seats`; False when the driver asked to stop."""
        trials = {
            s.trial: Trial(
                s.trial_dir, s.recipe, self._cache_for(s.recipe), self._class_cache_for(s.recipe)
            )
            for s in specs
        }
        by_trial = {spec.trial: spec for spec in specs}
        base = self._base_for(specs[0].recipe)
        base.release_encoders()
        # Before the first gradient is exchanged, since loading may take one worker much longer.
        self.group.wait_for_all()
        for spec in specs:
            last = last_with_state(spec.trial_dir)
            known = {"step": last.step if last else 0, "steps": spec.recipe.steps}
            self._send({"kind": "trial", "trial": spec.trial, **known})
        done = train_pack(
            base,
            list(trials.values()),
            rank=self.group.rank,
            world_size=self.group.world_size,
            on_event=self.on_event,
            on_checkpoint=lambda t, step, path: self._after_checkpoint(by_trial[t.id], step, path),
            on_failure=lambda trial, error: self._fail(by_trial[trial.id], error),
            stop=self.stopped,
            seats=seats,
            batch_workers=self.job.batch_workers,
        )
        for spec in specs:
            if spec.trial not in done:
                continue
            if done[spec.trial] < spec.recipe.steps or not self._score_the_rest(spec):
                self._send({"kind": "stopped", "trial": spec.trial})
                return False
            self._finish(spec)
        return True

    def _after_checkpoint(self, spec: TrialSpec, step: int, path: Path) -> None:
        self._send({"kind": "checkpoint", "trial": spec.trial, "step": step, "path": str(path)})
        whole = Checkpoint(step, path)
        self._raise_together(spec, lambda: self._score(spec, whole))
        for cut in spec.cuts:
            with cut_at(self._base_for(spec.recipe), cut.recipe.network.rank):
                self._raise_together(cut, functools.partial(self._cut_and_score, cut, whole))
        # Now, and not when the last of those that take its seat is done.
        if step >= spec.recipe.steps and self._all_scored(spec):
            self._finish(spec)
        if self.group.rank == 0 and not self.job.keep_all_states:
            drop_other_states(spec.trial_dir)

    def _all_scored(self, spec: TrialSpec) -> bool:
        if self.job.scoring is None or self.group.rank != 0:
            return True
        from training.scoring import existing_score

        checkpoints = [
            one for each in (spec, *spec.cuts) for one in list_checkpoints(each.trial_dir)
        ]
        return all(existing_score(one.path, self._base_scores) is not None for one in checkpoints)

    def _finish(self, spec: TrialSpec) -> None:
        for one in (spec, *spec.cuts):
            if one.trial not in self._finished:
                self._finished.add(one.trial)
                self._send({"kind": "finished", "trial": one.trial, "step": one.recipe.steps})

    def _score_the_rest(self, spec: TrialSpec) -> bool:
        """Cut and score checkpoints that a killed worker left; False when asked to stop."""
        if spec.cuts:
            self._raise_together(spec, lambda: self._cut_the_rest(spec))
        if self.job.scoring is None:
            return not self.group.rank_0_says(self.stopped)
        base = self._base_for(spec.recipe)
        try:
            for one in (spec, *spec.cuts):
                for checkpoint in self.group.rank_0_says(functools.partial(self._unscored, one)):
                    if self.group.rank_0_says(self.stopped):
                        return False
                    adapter = load_checkpoint(checkpoint.path).adapter
                    load_adapter(base, adapter, one.recipe.network)
                    self._raise_together(one, functools.partial(self._score, one, checkpoint))
        finally:
            detach(base)
        return not self.group.rank_0_says(self.stopped)

    def _cut_and_score(self, cut: TrialSpec, whole: Checkpoint) -> None:
        """Rank 0: keep a checkpoint's cut, which the adapter on the base is now, and score it."""
        self._score(cut, write_cut(whole, cut.trial_dir, cut.recipe))

    def _cut_the_rest(self, spec: TrialSpec) -> None:
        """Rank 0: keep the cuts of checkpoints that have none yet."""
        wholes = list_checkpoints(spec.trial_dir)
        for cut in spec.cuts:
            kept = {checkpoint.step for checkpoint in list_checkpoints(cut.trial_dir)}
            for whole in wholes:
                if whole.step not in kept:
                    write_cut(whole, cut.trial_dir, cut.recipe)

    def _unscored(self, spec: TrialSpec) -> list[Checkpoint]:
        from training.scoring import existing_score

        return [
            checkpoint
            for checkpoint in list_checkpoints(spec.trial_dir)
            if existing_score(checkpoint.path, self._base_scores) is None
        ]

    def _score(self, spec: TrialSpec, checkpoint: Checkpoint) -> None:
        """Rank 0: score the adapter that is on the base now as `checkpoint`."""
        if self.job.scoring is None:
            return
        from training.scoring import score_checkpoint

        base = self._base_for(spec.recipe)
        started = time.perf_counter()
        try:
            score = score_checkpoint(
                base,
                self._load_dataset(),
                self.job.scoring,
                self._embedder,
                self._base_scores,
                checkpoint.path,
            )
        finally:
            base.release_encoders()
        self._send(
            {
                "kind": "score",
                "trial": spec.trial,
                "step": checkpoint.step,
                "score": score.model_dump(mode="json"),
                "seconds": time.perf_counter() - started,
            }
        )

    def _reference(self) -> Recipe:
        """The trial on whose base, bare, all are compared with: the least rounded one's."""
        recipes = [spec.recipe for spec in self.job.trials]
        return min(recipes, key=lambda recipe: BASE_PRECISIONS.index(recipe.base_precision))

    def _score_bare_base(self, reference: Recipe) -> None:
        if self.job.scoring is None:
            return
        from captioning import STARTER_CLIP, Embedder
        from training.scoring import score_base

        self._send({"kind": "base", "state": "scoring"})
        self._embedder = Embedder(self.job.scoring.embedder or STARTER_CLIP)
        self._base_scores = score_base(
            self._base_for(reference),
            self._load_dataset(),
            self.job.scoring,
            self._embedder,
            Path(self.job.score_dir),
        )
        self._send({"kind": "base", "state": "scored"})

    def _raise_together(self, spec: TrialSpec, act: Callable[[], None]) -> None:
        """Let rank 0 act; if that fails, every rank raises, so that none waits for another."""
        if self.group.world_size == 1:
            return act()

        def attempt() -> tuple[str, str, str] | None:
            try:
                act()
            except UserError as error:
                return error.where, error.found, error.fix
            except Exception as error:
                return "scoring", f"{type(error).__name__}: {error}", traceback.format_exc()
            return None

        failure = self._on_rank_0(spec.recipe, attempt)
        if failure is not None:
            raise UserError(*failure)

    def _base_for(self, recipe: Recipe) -> Base:
        """The base in the recipe's form; one is in memory at a time."""
        # Asking for the family may ask the hub: once is enough.
        half = self._base.half if self._base is not None else family_of(self.job.base).half
        dtype = base_dtype(recipe, self.device, half)
        form = recipe.base_precision
        if self._base is None or (self._base.dtype, self._base.held_as) != (dtype, form):
            self._release_base()
            self._base = self._load_base(dtype, form)
        return self._base

    def _load_base(self, dtype: torch.dtype, form: str) -> Base:
        place = self.job.base, self.device, dtype
        if self.job.is_shared_out and self.job.offload_base:
            refuse_offloading_to_itself(self.device)
        if self.job.strategy == "deepspeed":
            base = load_with_zero(*place, self.job.offload_base)
        elif self._mesh is not None:
            base = load_sharded(*place, self._mesh, self.job.offload_base)
        else:
            base = load_quantised(*place, form)
        if self.job.gradient_checkpointing:
            base.denoiser.enable_gradient_checkpointing()
        if self.job.compile:
            buckets = any(spec.recipe.aspect_buckets for spec in self.job.trials)
            compile_blocks(base, shapes_vary=buckets)
        return base

    def _release_base(self) -> None:
        """Free the base's memory before another takes its place."""
        if self._base is not None:
            release_engine(self._base)
        self._base = None
        gc.collect()  # compiled and shared blocks are in cycles

    def _encoding_base(self, recipe: Recipe) -> Base:
        """A base whose encoders are the recipe's: they do not depend on the denoiser's form."""
        if self.job.strategy == "deepspeed" and self._base is not None:
            return self._base  # another could only be loaded by all workers together
        return self._base_for(recipe)

    def _cache_for(self, recipe: Recipe) -> LatentCache:
        """The encoded dataset; in memory once for all trials that can share it."""
        captions, limits = CaptionPlan.of(recipe), BucketLimits.of(recipe)
        key = recipe.resolution, recipe.flip, captions, limits
        if key not in self._caches:
            base = self._encoding_base(recipe)
            self._caches[key] = encode_dataset(
                self._load_dataset(),
                base,
                recipe.resolution,
                recipe.flip,
                Path(self.job.latents_dir),
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

    def _class_cache_for(self, recipe: Recipe) -> LatentCache | None:
        """The encoded class pictures, if the recipe names any; in memory once likewise."""
        name = recipe.class_pictures
        if name is None:
            return None
        key = recipe.resolution, recipe.flip, name, recipe.class_prompt
        if key not in self._caches:
            if self.job.store is None:
                raise ValueError("the job does not say where class pictures are stored")
            pictures = load_class_pictures(Store(Path(self.job.store)), name)
            self._caches[key] = encode_samples(
                class_samples(pictures, recipe.class_prompt, self._load_dataset()),
                self._encoding_base(recipe),
                recipe.resolution,
                recipe.flip,
                Path(self.job.latents_dir),
                self._tell_encoded,
            )
        return self._caches[key]

    def _tell_encoded(self, done: int, total: int) -> None:
        self._send({"kind": "encode", "done": done, "total": total})

    def _tell_buckets(self, cache: LatentCache, base: Base) -> None:
        sides = (
            (*bucket.mean.shape[-2:], count)
            for bucket, count in zip(cache.buckets, cache.counts, strict=True)
        )
        factor = base.vae_factor
        told = [(height * factor, width * factor, count) for height, width, count in sides]
        self._send({"kind": "buckets", "buckets": told})

    def _load_dataset(self) -> DatasetVersion:
        if self._dataset is None:
            self._dataset = load_dataset(Path(self.job.dataset_path))
        return self._dataset

    def _fail(self, spec: TrialSpec, error: BaseException) -> None:
        """Rank 0: write down why the trial has failed, and say so."""
        if self.group.rank != 0:
            return
        content = {
            "trial": spec.trial,
            "error": str(error) or type(error).__name__,
            "traceback": "".join(traceback.format_exception(error)),
        }
        write_atomic(spec.trial_dir / FAILED_FILE, json.dumps(content, indent=1).encode())
        self._send({"kind": "failed", "trial": spec.trial, "error": content["error"]})

    def _send(self, event: Event) -> None:
        if self.group.rank == 0:
            self.on_event(event)

    def _enter(self, phase: str) -> None:
        if self.ledger is not None:
            self.ledger.enter(phase)

    def _died_too_often(self, phase: str) -> bool:
        return self.ledger is not None and self.ledger.deaths(phase) >= self.max_deaths

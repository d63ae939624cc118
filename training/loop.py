"""The training loop: learning rate, micro-steps, clip, step, log, checkpoint, for a pack of trials.

A base and trials (recipe, latent cache, folder) in, checkpoints and metrics in the trials' folders
out. Every trial goes on from its last whole checkpoint by itself; an interrupted run equals an
unbroken one. One trial is a pack of one: the same code.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from captioning import UserError
from training.adapters import detach
from training.batches import (
    CLASS_STREAM,
    draw_batch,
    drawn_rank,
    of_one_shape,
    places_of,
    shared_out,
)
from training.checkpoints import save_checkpoint
from training.compiled import add_up_checked
from training.families import Base
from training.latents import LatentCache
from training.losses import pack_losses
from training.micro_batches import MicroBatches, is_out_of_memory
from training.pack.pack import Pack, seat
from training.pack.slot import Slot, Trial
from training.pack.waiting import Waiting
from training.recipe import Recipe
from training.schedule import learning_rate
from training.sharding import is_sharded
from training.telemetry import (
    append_row,
    begin_step,
    memory_bytes,
    pack_facts,
    speed,
)

AUTOCAST_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# The loss scaler starts at 2^16 (PyTorch's default) and halves at every overflow. Gradients that
# overflow even without being scaled up will not recover.
SMALLEST_LOSS_SCALE = 1.0
_REMEDY = "lower optimizer.lr, add schedule.warmup_steps, or set precision to fp32 or bf16"

Event = dict[str, Any]


class TrainingDiverged(UserError):
    """The loss or the gradients are no longer finite; checkpoints up to then remain usable."""


def resolve_precision(recipe: Recipe, device: torch.device, half: str) -> str:
    """fp32, bf16 or fp16; auto is the family's `half` on CUDA, and fp32 on a CPU, where half types
    are slower."""
    if recipe.precision != "auto":
        return recipe.precision
    return half if device.type == "cuda" else "fp32"


def base_dtype(recipe: Recipe, device: torch.device, half: str) -> torch.dtype:
    """What the frozen base is held in: half precision on CUDA where the recipe allows it.

    `half` is what the base's family means by `precision: auto`.
    """
    if device.type != "cuda":
        return torch.float32
    return AUTOCAST_DTYPES.get(resolve_precision(recipe, device, half), torch.float32)


def train(
    base: Base,
    cache: LatentCache,
    recipe: Recipe,
    trial_dir: Path,
    rank: int = 0,
    world_size: int = 1,
    on_event: Callable[[Event], None] | None = None,
    on_checkpoint: Callable[[int, Path], None] | None = None,
    stop: Callable[[], bool] | None = None,
    class_cache: LatentCache | None = None,
) -> int:
    """Train one trial, a pack of one, and return the last step done; see `train_pack`.

    Raises TrainingDiverged, on every rank, when the loss or an unscaled gradient is not finite,
    and whatever `on_checkpoint` raises.
    """
    failed: list[Exception] = []
    done = train_pack(
        base,
        [Trial(trial_dir, recipe, cache, class_cache)],
        rank,
        world_size,
        on_event=on_event,
        on_checkpoint=on_checkpoint and (lambda _, step, path: on_checkpoint(step, path)),
        on_failure=lambda _, error: failed.append(error),
        stop=stop,
    )
    if failed:
        raise failed[0]
    return done[trial_dir.name]


def train_pack(
    base: Base,
    trials: Sequence[Trial],
    rank: int = 0,
    world_size: int = 1,
    *,
    on_failure: Callable[[Trial, Exception], None],
    on_event: Callable[[Event], None] | None = None,
    on_checkpoint: Callable[[Trial, int, Path], None] | None = None,
    stop: Callable[[], bool] | None = None,
    seats: int | None = None,
    batch_workers: int | None = None,
) -> dict[str, int]:
    """Train `trials` together on one base; returns the last step done of each that did not fail.

    At most `seats` of them at a time (None: all): when one leaves, the next one that waits takes
    its place between two steps, and the others go on from the very numbers that they have.

    Each goes on from its last whole checkpoint and ends as if it had been trained alone, up to
    float rounding; a pack that is interrupted and goes on in the same composition ends bit for bit
    as if it had never stopped. Finished trials leave the pack, and so do failing ones:
    `on_failure(trial, error)` is called on every rank when a trial's loss or gradients are no
    longer finite (TrainingDiverged), and when saving or `on_checkpoint` raises for it.

    With more than one worker each calls this with its rank, inside an initialised process group;
    `batch_size` counts per worker: of `batch_workers`, or of those that are here. A trial that goes
    on keeps the samples per step that it began with, whatever the number of workers now, and so
    ends as if that had never changed, up to float rounding. Rank 0 writes and sends the events: a
    `step` of every trial, once a `pack` (see `pack_facts`), and `compiled` (see `add_up_checked`).
    `on_checkpoint(trial, step, folder)` is called on every rank after each checkpoint is on disk,
    while the base acts with this trial's adapter alone. `stop` is asked after every step on every
    rank: when one says yes, all return (work since the last checkpoints is done again later). The
    base is left without adapters, bit for bit as it was.

    When memory runs out, the step is done again in smaller micro-batches, once, with the same
    samples and draws; the event `out_of_memory` and a file in the trials' folders say so (see
    `MicroBatches`). Raises OutOfMemory, on every rank, when that does not fit either, and
    ValueError for trials that cannot share a pack.
    """
    # With several workers only errors that all of them meet may be survived by all of them.
    survivable = Exception if world_size == 1 else UserError
    waiting = Waiting(trials, rank)
    done = waiting.done
    if not waiting:
        return done
    step_samples = waiting.step_samples(batch_workers or world_size)
    shared = shared_out(waiting.shared, step_samples, world_size)
    first = waiting.next_seats(base, seats)
    precision = resolve_precision(shared, base.device, base.half)
    with _deterministic(base.device), _bare_afterwards(base):
        pack: Pack | None = seat(base, first, scaled=precision == "fp16")
        is_told = rank != 0 or on_event is None
        micro_batches = MicroBatches(shared, [trial.trial_dir for trial, _ in first])
        while pack is not None:
            started = time.perf_counter()
            begin_step(base.device)
            bank, slots = pack.bank, pack.slots
            for slot in slots:
                bank.cut(slot.index, drawn_rank(slot.recipe, slot.step))
            bank.zero_grad()
            add_up = partial(
                _add_up_gradients, base, pack, micro_batches.recipe, precision, rank, world_size,
                step_samples,
            )  # fmt: skip
            losses, lack, checked = add_up_checked(base, bank, precision, add_up)
            if checked is not None and rank == 0 and on_event is not None:
                on_event({"kind": "compiled", **checked})

            stopping = stop is not None and stop()
            is_lacking = lack is not None
            if world_size > 1:
                losses, stopping, is_lacking = _average(
                    bank.grads, losses, stopping, is_lacking, world_size
                )
            if is_lacking:
                micro_batches.shrink(lack or "another worker ran out of memory", pack)
                continue
            untold = micro_batches.untold(pack)
            if untold and rank == 0:
                kept = micro_batches.keep(untold)
                if on_event is not None:
                    on_event({"kind": "out_of_memory", **kept})
            for slot in slots:
                slot.scaler.unscale_(slot.optimizer)
            norms = bank.clip([slot.recipe.clip_norm for slot in slots])
            gone, rows = [], {}
            for slot, loss, norm in zip(slots, losses.tolist(), norms.tolist(), strict=True):
                lr = learning_rate(slot.recipe, slot.step)
                slot.set_learning_rate(lr)
                slot.step += 1
                try:
                    _check_finite(slot, loss, norm)
                except TrainingDiverged as error:
                    gone.append(slot)
                    del done[slot.trial.id]
                    on_failure(slot.trial, error)
                    continue
                slot.take_step()
                done[slot.trial.id] = slot.step
                rows[slot] = {
                    "step": slot.step,
                    "loss": loss,
                    "lr": lr,
                    # An overflowed fp16 step has no norm: the optimiser skipped it.
                    "grad_norm": norm if math.isfinite(norm) else None,
                }
            bank.changed()
            taken = speed(time.perf_counter() - started, len(slots), step_samples)
            memory = memory_bytes(base.device)
            for slot, row in rows.items() if rank == 0 else ():
                append_row(slot.trial.trial_dir, row | taken | memory)
                if on_event is not None:
                    known = {"trial": slot.trial.id, "steps": slot.recipe.steps}
                    on_event({"kind": "step", **known, **row, **taken, **memory})
            # An optimiser makes its state in its first step, unless fp16 overflows.
            if on_event and not is_told and all(slot.optimizer.state for slot in slots):
                on_event({"kind": "pack", **pack_facts(pack)})
                is_told = True

            for slot in slots:
                if slot in gone or slot.step not in slot.checkpoint_steps:
                    continue
                try:
                    if rank == 0:
                        saved = slot.contents()
                        save_checkpoint(
                            slot.trial.trial_dir,
                            slot.step,
                            slot.recipe,
                            saved.adapter,
                            saved.state,
                            step_samples,
                        )
                    if on_checkpoint is not None:
                        folder = slot.trial.trial_dir / f"step-{slot.step:06d}"
                        with slot.alone():
                            on_checkpoint(slot.trial, slot.step, folder)
                except survivable as error:
                    gone.append(slot)
                    del done[slot.trial.id]
                    on_failure(slot.trial, error)
            gone += [slot for slot in slots if slot not in gone and slot.step >= slot.recipe.steps]
            if stopping:
                break
            if gone:
                pack = pack.without(gone, waiting.next_seats(base, len(gone)))
    return done


def _add_up_gradients(
    base: Base,
    pack: Pack,
    split: Recipe,
    precision: str,
    rank: int,
    world_size: int,
    step_samples: int,
) -> tuple[Tensor, str | None]:
    """Forward and backward of a step, in the micro-batches of `split`; mean losses.  # (K,)

    With them what was said if memory ran out on the way; the gradients are then of no use.
    """
    bank, slots = pack.bank, pack.slots
    losses = torch.zeros(len(slots), device=base.device)
    # Of one worker, in micro-batches; not a whole number where they cannot be dealt out evenly.
    mean_share = step_samples / (split.batch_size * world_size)
    try:
        for micro_step in range(split.accumulation):
            places = places_of(split, micro_step, rank, world_size)
            is_spare = places.start >= step_samples
            if is_spare:  # computed all the same: a shared base needs every worker in every pass
                places = range(split.batch_size)
            batches, of_class = [], []
            for slot in slots:
                counters = slot.step, places, step_samples, base.objective
                batches.append(draw_batch(slot.recipe, slot.trial.cache, *counters))
                if (cache := slot.trial.class_cache) is not None:  # of all slots, or of none
                    of_class.append(draw_batch(slot.recipe, cache, *counters, CLASS_STREAM))
            # Slots whose buckets differ in shape compute one after the other, on every worker in
            # the same order.
            for alike in of_one_shape(batches):
                own = [slots[index] for index in alike]
                theirs = [of_class[index] for index in alike if of_class]
                with bank.only(alike):
                    with _autocast(base.device, precision):
                        errors = pack_losses(
                            base, bank, own, [batches[index] for index in alike], theirs
                        )
                    # Every micro-batch has as many samples, so the mean of means is the mean.
                    # Added up over the slots: no sample's gradient reaches another slot.
                    micro_losses = errors.mean(dim=1) / mean_share  # (k,)
                    if is_spare:
                        micro_losses = micro_losses * 0
                    scaled = [
                        slot.scaler.scale(loss)
                        for slot, loss in zip(own, micro_losses, strict=True)
                    ]
                    torch.stack(scaled).sum().backward()
                losses[alike] += micro_losses.detach()
    except (RuntimeError, MemoryError) as error:
        # The other workers are waiting for this one's shares: none can go on.
        if not is_out_of_memory(error) or is_sharded(base):
            raise
        # Only its words: the error itself holds on to what was allocated.
        return losses, str(error).strip().split("\n")[0] or type(error).__name__
    return losses, None


def _average(
    grads: Tensor, losses: Tensor, stopping: bool, is_lacking: bool, world_size: int
) -> tuple[Tensor, bool, bool]:
    """Mean gradients and losses over the workers, in one collective.

    Any worker's stop is all's, and so is its lack of memory. Scaled fp16 gradients of a slot that
    overflowed on one worker are infinite on all, so all skip that slot's step.
    """
    flags = torch.tensor([float(stopping), float(is_lacking)], device=losses.device)
    flat = torch.cat([flags, losses, grads.flatten()])
    dist.all_reduce(flat)
    flat /= world_size
    flags, losses, averaged = flat.split([2, len(losses), grads.numel()])
    grads.copy_(averaged.view_as(grads))
    return losses, bool(flags[0] > 0), bool(flags[1] > 0)


def _check_finite(slot: Slot, loss: float, grad_norm: float) -> None:
    where = f"trial {slot.trial.id}, step {slot.step}"
    if not math.isfinite(loss):
        raise TrainingDiverged(where, f"the loss is {loss}", _REMEDY)
    if math.isfinite(grad_norm):
        return
    if not slot.scaler.is_enabled():
        raise TrainingDiverged(where, f"the norm of the gradients is {grad_norm}", _REMEDY)
    if slot.scaler.get_scale() <= SMALLEST_LOSS_SCALE:
        raise TrainingDiverged(where, "the fp16 gradients overflow at every loss scale", _REMEDY)


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = AUTOCAST_DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def _bare_afterwards(base: Base) -> Iterator[None]:
    try:
        yield
    finally:
        detach(base)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Bit-equal repeats on a CPU, where they cost nothing; a GPU keeps its fast kernels."""
    if device.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    filling: Any = torch.utils.deterministic
    fill_before = filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Writing NaN into every new tensor finds reads of unset memory; it is not free.
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        filling.fill_uninitialized_memory = fill_before

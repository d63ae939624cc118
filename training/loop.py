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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioning import UserError
from training.compiled import add_up_checked
from training.data.batches import drawn_rank, shared_out
from training.data.latents import LatentCache
from training.events import Event, OnEvent, StepTaken
from training.families import Base
from training.families.compiled_blocks import CompiledBlocks, is_compiled
from training.gradients import add_up_gradients, average
from training.group import ALONE, Workers
from training.metrics_file import append_row
from training.micro_batches import MicroBatches
from training.pack.adapters import detach
from training.pack.pack import Pack, form_pack
from training.pack.saving import keep_checkpoints
from training.pack.slot import Slot, Trial
from training.pack.waiting import WaitingTrials
from training.precision import resolve_precision
from training.recipe import Recipe
from training.schedule import learning_rate
from training.telemetry import begin_step, pack_measured, peak_device_bytes, resident_bytes

# The loss scaler starts at 2^16 (PyTorch's default) and halves at every overflow. Gradients that
# overflow even without being scaled up will not recover.
SMALLEST_LOSS_SCALE = 1.0
_REMEDY = "lower optimizer.lr, add schedule.warmup_steps, or set precision to fp32 or bf16"


class TrainingDiverged(UserError):
    """The loss or the gradients are no longer finite; checkpoints up to then remain usable."""


@dataclass(frozen=True)
class Callbacks:
    """What the loop tells its caller, and how the caller stops it."""

    #: Called on every rank when a trial's loss or gradients are no longer finite (with a
    #: TrainingDiverged), and when saving or `on_checkpoint` raises for it.
    on_failure: Callable[[Trial, Exception], None]
    #: Called on rank 0 alone with `StepTaken`, `PackMeasured` (once), `CompiledChecked` and
    #: `MemorySplit`.
    on_event: OnEvent | None = None
    #: Called on every rank with the trial, the step and the checkpoint's folder, after all
    #: checkpoints of the step are on disk, while the base acts with this trial's adapter alone.
    on_checkpoint: Callable[[Trial, int, Path], None] | None = None
    #: Asked on every rank after every step: when one says yes, all return.
    stop: Callable[[], bool] | None = None


def train(
    base: Base,
    cache: LatentCache,
    recipe: Recipe,
    trial_dir: Path,
    workers: Workers = ALONE,
    *,
    class_cache: LatentCache | None = None,
    on_event: OnEvent | None = None,
    on_checkpoint: Callable[[int, Path], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> int:
    """Train one trial, a pack of one, and return the last step done; see `train_pack`.

    Raises TrainingDiverged, on every rank, when the loss or an unscaled gradient is not finite,
    and whatever `on_checkpoint` raises.
    """
    failed: list[Exception] = []
    callbacks = Callbacks(
        on_failure=lambda _, error: failed.append(error),
        on_event=on_event,
        on_checkpoint=on_checkpoint and (lambda _, step, path: on_checkpoint(step, path)),
        stop=stop,
    )
    done = train_pack(base, [Trial(trial_dir, recipe, cache, class_cache)], callbacks, workers)
    if failed:
        raise failed[0]
    return done[trial_dir.name]


def train_pack(
    base: Base,
    trials: Sequence[Trial],
    callbacks: Callbacks,
    workers: Workers = ALONE,
    *,
    trials_per_pack: int | None = None,
    compiled: CompiledBlocks | None = None,
) -> dict[str, int]:
    """Train `trials` together on one base; returns the last step done of each that did not fail.

    At most `trials_per_pack` train at a time (None: all). When one leaves, the next one that waits
    takes its slot between two steps, and the others go on from the very numbers that they have.

    Each goes on from its last whole checkpoint and ends as if it had been trained alone, up to
    float rounding; a pack that is interrupted and goes on in the same composition ends bit for bit
    as if it had never stopped. Finished trials leave the pack, and so do failing ones. When
    `callbacks.stop` says yes, work since the last checkpoints is done again later. The base is left
    without adapters, bit for bit as it was.

    With more than one worker each calls this with its rank, inside an initialised process group.
    A trial that goes on keeps the samples per step that it began with, whatever the number of
    workers now, and so ends as if that had never changed, up to float rounding.

    `compiled` is what `compile_blocks` returned for `base`, if it was called: its programs are
    checked as they are made.

    When memory runs out, the step is done again in smaller micro-batches, once, with the same
    samples and draws; the event `MemorySplit` and a file in the trials' folders say so (see
    `MicroBatches`). Raises OutOfMemory, on every rank, when that does not fit either, and
    ValueError for trials that cannot share a pack and for a compiled base without `compiled`.
    """
    if compiled is None and is_compiled(base.denoiser):
        raise ValueError("the base is compiled: give what compile_blocks returned, to be checked")
    waiting = WaitingTrials(trials, workers.rank)
    done = waiting.done
    if not waiting:
        return done
    step_samples = waiting.step_samples(workers.batch_workers or workers.world_size)
    shared = shared_out(waiting.shared, step_samples, workers.world_size)
    precision = resolve_precision(shared, base.device, base.half)
    with _deterministic(base.device), _bare_afterwards(base):
        states = waiting.take_next(base, trials_per_pack)
        micro_batches = MicroBatches(shared, [state.trial.trial_dir for state in states])
        run = _Run(base, callbacks, workers, compiled, step_samples, precision, micro_batches, done)
        while states:
            pack = form_pack(base, states, precision == "fp16", workers.optimizers_shared_in)
            states = []  # nothing but the pack holds what it is trained with
            gone, stopping = run.until_somebody_leaves(pack)
            if stopping:
                break
            states = pack.states_without(gone)
            states += waiting.take_next(base, len(gone))
            del pack, gone  # before the next one needs the room
            detach(base)
    return done


@dataclass(frozen=True)
class _Taken:
    """What one trial's step came to."""

    loss: float
    lr: float
    grad_norm: float | None  # None: an overflowed fp16 step


@dataclass
class _Run:
    """What the steps of one call of `train_pack` have in common."""

    base: Base
    callbacks: Callbacks
    workers: Workers
    compiled: CompiledBlocks | None
    step_samples: int  # of each trial, over all workers
    precision: str
    micro_batches: MicroBatches
    done: dict[str, int]  # the last step of every trial that has not failed
    is_measured: bool = False  # whether `PackMeasured` was sent

    def until_somebody_leaves(self, pack: Pack) -> tuple[list[Slot], bool]:
        """Train until trials are finished or failed, or all are asked to stop.

        Returns the slots that leave, and whether somebody asked to stop.
        """
        # With several workers, a trial's error may only be survived if all workers meet it.
        survivable = Exception if self.workers.world_size == 1 else UserError
        while True:
            started = time.perf_counter()
            losses, stopping = self._compute(pack)
            if losses is None:
                continue
            taken, gone = self._take_steps(pack, losses)
            self._write_down(pack, taken, started)
            gone += keep_checkpoints(
                [slot for slot in taken if slot.step in slot.checkpoint_steps],
                self.workers.rank,
                self.step_samples,
                self.callbacks.on_checkpoint,
                survivable,
                self._fail,
            )
            gone += [s for s in taken if s not in gone and s.step >= s.recipe.steps]
            if stopping or gone:
                return gone, stopping

    def _compute(self, pack: Pack) -> tuple[Tensor | None, bool]:
        """Put a step's gradients into the bank; returns the losses and whether to stop.

        There are no losses if memory ran out: the step is then to be computed again, in smaller
        micro-batches.
        """
        bank, micro_batches, workers = pack.bank, self.micro_batches, self.workers
        begin_step(self.base.device)
        for slot in pack.slots:
            bank.cut(slot.index, drawn_rank(slot.recipe, slot.step))
        bank.zero_grad()
        split = micro_batches.recipe
        add_up = partial(add_up_gradients, pack, split, self.precision, workers, self.step_samples)
        losses, lack, checked = add_up_checked(self.compiled, bank, self.precision, add_up)
        if checked is not None:
            self._tell(checked)
        stopping = self.callbacks.stop is not None and self.callbacks.stop()
        is_lacking = lack is not None
        if workers.world_size > 1:
            losses, stopping, is_lacking = average(
                bank.grads, losses, stopping, is_lacking, workers.world_size
            )
        if is_lacking:
            micro_batches.shrink(lack or "another worker ran out of memory", pack)
            return None, stopping
        untold = micro_batches.untold(pack)
        if untold and workers.rank == 0:
            self._tell(micro_batches.keep(untold))
        return losses, stopping

    def _take_steps(self, pack: Pack, losses: Tensor) -> tuple[dict[Slot, _Taken], list[Slot]]:
        """Take the optimisers' steps; returns what each came to, and the slots that have failed."""
        bank, slots = pack.bank, pack.slots
        for slot in slots:
            slot.scaler.unscale_(slot.optimizer)
        norms = bank.clip([slot.recipe.clip_norm for slot in slots])
        taken: dict[Slot, _Taken] = {}
        gone = []
        for slot, loss, norm in zip(slots, losses.tolist(), norms.tolist(), strict=True):
            lr = learning_rate(slot.recipe, slot.step)
            slot.set_learning_rate(lr)
            slot.step += 1
            try:
                _check_finite(slot, loss, norm)
            except TrainingDiverged as error:
                gone.append(slot)
                self._fail(slot, error)
                continue
            slot.take_step()
            self.done[slot.trial.id] = slot.step
            # An overflowed fp16 step has no norm: the optimiser skipped it.
            taken[slot] = _Taken(loss, lr, norm if math.isfinite(norm) else None)
        for slot in taken:
            slot.share_step()
        bank.changed()
        return taken, gone

    def _write_down(self, pack: Pack, taken: dict[Slot, _Taken], started: float) -> None:
        """On rank 0, add the steps' rows to the trials' folders and send their events."""
        seconds, slots = time.perf_counter() - started, len(pack.slots)
        rate = self.step_samples / seconds
        device = self.base.device
        peak, resident = peak_device_bytes(device), resident_bytes(device)
        for slot, one in taken.items() if self.workers.rank == 0 else ():
            event = StepTaken(
                trial=slot.trial.id,
                step=slot.step,
                steps=slot.recipe.steps,
                loss=one.loss,
                lr=one.lr,
                grad_norm=one.grad_norm,
                step_ms=seconds * 1000,
                pack=slots,
                images_per_s=rate,
                pack_images_per_s=rate * slots,
                peak_device_bytes=peak,
                resident_bytes=resident,
            )
            append_row(slot.trial.trial_dir, event.row())
            self._tell(event)
        if self.workers.rank != 0 or self.callbacks.on_event is None or self.is_measured:
            return
        # An optimiser makes its state in its first step, unless fp16 overflows.
        if all(slot.optimizer.state for slot in pack.slots if slot.is_kept_here):
            self._tell(pack_measured(pack))
            self.is_measured = True

    def _fail(self, slot: Slot, error: Exception) -> None:
        del self.done[slot.trial.id]
        self.callbacks.on_failure(slot.trial, error)

    def _tell(self, event: Event) -> None:
        if self.workers.rank == 0 and self.callbacks.on_event is not None:
            self.callbacks.on_event(event)


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


@contextmanager
def _bare_afterwards(base: Base) -> Iterator[None]:
    try:
        yield
    finally:
        detach(base)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Make repeats bit-equal on a CPU, where that costs nothing; a GPU keeps its fast kernels."""
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

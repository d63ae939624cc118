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
from training.gradients import add_up_gradients, average
from training.group import Group
from training.metrics_file import append_row
from training.micro_batches import MicroBatches
from training.pack.adapters import detach
from training.pack.pack import Pack, seat
from training.pack.saving import keep_checkpoints
from training.pack.slot import Slot, Trial
from training.pack.waiting import Waiting
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


def train(
    base: Base,
    cache: LatentCache,
    recipe: Recipe,
    trial_dir: Path,
    rank: int = 0,
    world_size: int = 1,
    on_event: OnEvent | None = None,
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
    on_event: OnEvent | None = None,
    on_checkpoint: Callable[[Trial, int, Path], None] | None = None,
    stop: Callable[[], bool] | None = None,
    seats: int | None = None,
    batch_workers: int | None = None,
    optimizers_shared_in: Group | None = None,
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
    ends as if that had never changed, up to float rounding. With `optimizers_shared_in` the workers
    of this group keep the optimisers of a part of the trials each: the same numbers, see
    `pack.keepers`. Rank 0 writes and sends the events: `StepTaken`, `PackMeasured` once,
    `CompiledChecked` and `MemorySplit`.
    `on_checkpoint(trial, step, folder)` is called on every rank after the checkpoints of a step are
    on disk, all of them, while the base acts with this trial's adapter alone. `stop` is asked after
    every step on every rank: when one says yes, all return (work since the last checkpoints is done
    again later). The base is left without adapters, bit for bit as it was.

    When memory runs out, the step is done again in smaller micro-batches, once, with the same
    samples and draws; the event `MemorySplit` and a file in the trials' folders say so (see
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
    precision = resolve_precision(shared, base.device, base.half)
    with _deterministic(base.device), _bare_afterwards(base):
        seated = waiting.next_seats(base, seats)
        micro_batches = MicroBatches(shared, [one.trial.trial_dir for one in seated])
        run = _Run(
            base, rank, world_size, step_samples, precision, micro_batches, done, survivable,
            on_failure, on_event, on_checkpoint,
        )  # fmt: skip
        while seated:
            pack = seat(base, seated, precision == "fp16", optimizers_shared_in)
            seated = []  # nothing but the pack holds what it is trained with
            gone, stopping = run.until_somebody_leaves(pack, stop)
            if stopping:
                break
            seated = pack.seats_without(gone)
            seated += waiting.next_seats(base, len(gone))
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
    rank: int
    world_size: int
    step_samples: int
    precision: str
    micro_batches: MicroBatches
    done: dict[str, int]  # the last step of every trial that has not failed
    survivable: type[Exception]
    on_failure: Callable[[Trial, Exception], None]
    on_event: OnEvent | None
    on_checkpoint: Callable[[Trial, int, Path], None] | None
    is_measured: bool = False  # whether `PackMeasured` was sent

    def until_somebody_leaves(
        self, pack: Pack, stop: Callable[[], bool] | None
    ) -> tuple[list[Slot], bool]:
        """Train until trials are finished or failed, or all are asked to stop; who, and whether."""
        while True:
            started = time.perf_counter()
            losses, stopping = self._compute(pack, stop)
            if losses is None:
                continue
            taken, gone = self._take_steps(pack, losses)
            self._write_down(pack, taken, started)
            gone += keep_checkpoints(
                [slot for slot in taken if slot.step in slot.checkpoint_steps],
                self.rank,
                self.step_samples,
                self.on_checkpoint,
                self.survivable,
                self._fail,
            )
            gone += [s for s in taken if s not in gone and s.step >= s.recipe.steps]
            if stopping or gone:
                return gone, stopping

    def _compute(self, pack: Pack, stop: Callable[[], bool] | None) -> tuple[Tensor | None, bool]:
        """The gradients of a step in the bank, the losses, and whether somebody asked to stop.

        No losses if memory ran out: the step is to be computed again, in smaller micro-batches.
        """
        base, bank, micro_batches = self.base, pack.bank, self.micro_batches
        begin_step(base.device)
        for slot in pack.slots:
            bank.cut(slot.index, drawn_rank(slot.recipe, slot.step))
        bank.zero_grad()
        add_up = partial(
            add_up_gradients, base, pack, micro_batches.recipe, self.precision, self.rank,
            self.world_size, self.step_samples,
        )  # fmt: skip
        losses, lack, checked = add_up_checked(base, bank, self.precision, add_up)
        if checked is not None:
            self._tell(checked)
        stopping = stop is not None and stop()
        is_lacking = lack is not None
        if self.world_size > 1:
            losses, stopping, is_lacking = average(
                bank.grads, losses, stopping, is_lacking, self.world_size
            )
        if is_lacking:
            micro_batches.shrink(lack or "another worker ran out of memory", pack)
            return None, stopping
        untold = micro_batches.untold(pack)
        if untold and self.rank == 0:
            self._tell(micro_batches.keep(untold))
        return losses, stopping

    def _take_steps(self, pack: Pack, losses: Tensor) -> tuple[dict[Slot, _Taken], list[Slot]]:
        """Take the optimisers' steps; what each came to, and the slots that have failed."""
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
        """Rank 0: the steps' rows in the trials' folders, and their events."""
        seconds, slots = time.perf_counter() - started, len(pack.slots)
        rate = self.step_samples / seconds
        device = self.base.device
        peak, resident = peak_device_bytes(device), resident_bytes(device)
        for slot, one in taken.items() if self.rank == 0 else ():
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
        if self.rank != 0 or self.on_event is None or self.is_measured:
            return
        # An optimiser makes its state in its first step, unless fp16 overflows.
        if all(slot.optimizer.state for slot in pack.slots if slot.is_kept_here):
            self.on_event(pack_measured(pack))
            self.is_measured = True

    def _fail(self, slot: Slot, error: Exception) -> None:
        del self.done[slot.trial.id]
        self.on_failure(slot.trial, error)

    def _tell(self, event: Event) -> None:
        if self.rank == 0 and self.on_event is not None:
            self.on_event(event)


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

"""The training loop of one trial: learning rate, micro-steps, clip, step, log, checkpoint.

A base, a latent cache and a recipe in, checkpoints and metrics in the trial's folder out. It goes
on from the last whole checkpoint by itself; an interrupted run equals an unbroken one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from captioning import UserError, write_atomic
from training.adapters import adapter_state, attach, detach, load_adapter, named_adapter_parameters
from training.batches import draw_batch, samples_per_step, slots_of
from training.checkpoints import (
    list_checkpoints,
    load_checkpoint,
    optimizer_tensors,
    remove_unfinished,
    restore_optimizer,
    save_checkpoint,
)
from training.families import Base
from training.latents import LatentCache
from training.recipe import Recipe
from training.schedule import add_noise, learning_rate, min_snr_weights, training_target

METRICS_FILE = "metrics.jsonl"
AUTOCAST_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# The loss scaler starts at 2^16 (PyTorch's default) and halves at every overflow. Gradients that
# overflow even without being scaled up will not recover.
SMALLEST_LOSS_SCALE = 1.0
_REMEDY = "lower optimizer.lr, add schedule.warmup_steps, or set precision to fp32 or bf16"

Event = dict[str, Any]


class TrainingDiverged(UserError):
    """The loss or the gradients are no longer finite; checkpoints up to then remain usable."""


def resolve_precision(recipe: Recipe, device: torch.device) -> str:
    """fp32, bf16 or fp16; auto is fp16 on CUDA and fp32 on a CPU, where half types are slower."""
    if recipe.precision != "auto":
        return recipe.precision
    return "fp16" if device.type == "cuda" else "fp32"


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
) -> int:
    """Train the trial in `trial_dir` (its name is the trial's id) and return the last step done.

    Goes on from the last whole checkpoint, and with as many workers as before ends as if it had
    never stopped; a finished trial returns at once. With more than one
    worker each calls this with its rank, inside an initialised process group; `batch_size` counts
    per worker. Rank 0 writes and sends the events; `on_checkpoint(step, folder)` is called on
    every rank after each checkpoint is on disk, with the adapter on the base. `stop` is asked
    after every step on every rank: when one says yes, all return that step (work since the last
    checkpoint is done again later). The base is left without adapter, bit for bit as it was.

    Raises TrainingDiverged, on every rank, when the loss or an unscaled gradient is not finite.
    """
    checkpoints = list_checkpoints(trial_dir)
    first_step = checkpoints[-1].step if checkpoints else 0
    if first_step >= recipe.steps:
        return recipe.steps
    saved = load_checkpoint(checkpoints[-1].path) if checkpoints else None

    precision = resolve_precision(recipe, base.device)
    if saved is None:
        parameters = attach(base, recipe.network, recipe.seed)
    else:
        parameters = load_adapter(base, saved.adapter, recipe.network)
    names = [name for name, _ in named_adapter_parameters(base)]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=recipe.optimizer.lr,
        betas=recipe.optimizer.betas,
        eps=recipe.optimizer.eps,
        weight_decay=recipe.optimizer.weight_decay,
    )
    scaler = torch.amp.GradScaler(base.device.type, enabled=precision == "fp16")
    if saved is not None:
        restore_optimizer(saved.state, optimizer, names, scaler)

    checkpoint_steps = frozenset(recipe.checkpoint_steps())
    step_samples = samples_per_step(recipe, world_size)
    timestep_count = len(base.scheduler.alphas_cumprod)
    if rank == 0:
        trial_dir.mkdir(parents=True, exist_ok=True)
        remove_unfinished(trial_dir)
        _drop_metrics_after(trial_dir / METRICS_FILE, first_step)
    try:
        with _deterministic(base.device), _metrics_writer(trial_dir, rank) as write_metrics:
            for step in range(first_step, recipe.steps):
                started = time.perf_counter()
                lr = learning_rate(recipe, step)
                for group in optimizer.param_groups:
                    group["lr"] = lr

                loss = torch.zeros((), device=base.device)
                for micro_step in range(recipe.accumulation):
                    slots = slots_of(recipe, micro_step, rank, world_size)
                    batch = draw_batch(recipe, cache, step, slots, step_samples, timestep_count)
                    with _autocast(base.device, precision):
                        losses = _sample_losses(base, recipe, batch.posterior_samples, batch.noise,
                                                batch.timesteps, batch.text)  # fmt: skip
                    # Every micro-batch has as many samples, so the mean of means is the mean.
                    micro_loss = losses.mean() / recipe.accumulation
                    scaler.scale(micro_loss).backward()
                    loss += micro_loss.detach()

                stopping = stop is not None and stop()
                if world_size > 1:
                    loss, stopping = _average(parameters, loss, stopping, world_size)
                scaler.unscale_(optimizer)
                limit = recipe.clip_norm if recipe.clip_norm is not None else math.inf
                grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
                _check_finite(trial_dir.name, step + 1, float(loss), grad_norm, scaler)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)

                row = {
                    "step": step + 1,
                    "loss": float(loss),
                    "lr": lr,
                    # An overflowed fp16 step has no norm: the optimiser skipped it.
                    "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                    "step_ms": (time.perf_counter() - started) * 1000,
                }
                write_metrics(row)
                if on_event is not None and rank == 0:
                    on_event(
                        {"kind": "step", "trial": trial_dir.name, "steps": recipe.steps, **row}
                    )
                if step + 1 in checkpoint_steps:
                    if rank == 0:
                        state = optimizer_tensors(optimizer, names, scaler)
                        save_checkpoint(trial_dir, step + 1, recipe, adapter_state(base), state)
                    if on_checkpoint is not None:
                        on_checkpoint(step + 1, trial_dir / f"step-{step + 1:06d}")
                if stopping:
                    return step + 1
    finally:
        detach(base)
    return recipe.steps


def _sample_losses(
    base: Base, recipe: Recipe, samples: Tensor, noise: Tensor, timesteps: Tensor, text: Tensor
) -> Tensor:
    """The weighted squared error of every sample, fp32.  # (B,)"""
    alphas = base.scheduler.alphas_cumprod
    device = base.device
    timesteps, noise, text = timesteps.to(device), noise.to(device), text.to(device)
    latents = base.to_latents(samples.to(device))  # (B, C, h, w)
    noisy = add_noise(latents, noise, alphas, timesteps)
    target = training_target(latents, noise, alphas, timesteps, base.prediction_type)
    prediction = base.predict(noisy, timesteps, text)
    errors = (prediction - target).square().mean(dim=(1, 2, 3))  # (B,)
    return errors * min_snr_weights(alphas, timesteps, base.prediction_type, recipe.min_snr_gamma)


def _average(
    parameters: list[Parameter], loss: Tensor, stopping: bool, world_size: int
) -> tuple[Tensor, bool]:
    """Mean gradients and loss over the workers, in one collective; any worker's stop is all's.

    Scaled fp16 gradients that overflowed on one worker are infinite on all, so all skip the step.
    """
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flags = torch.stack([loss, torch.tensor(float(stopping), device=loss.device)])
    flat = torch.cat([flags, *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(flat)
    flat /= world_size
    averaged = flat[2:].split([gradient.numel() for gradient in gradients])
    for parameter, gradient in zip(parameters, averaged, strict=True):
        parameter.grad = gradient.view_as(parameter).clone()
    return flat[0], bool(flat[1] > 0)


def _check_finite(
    trial: str, step: int, loss: float, grad_norm: float, scaler: torch.amp.GradScaler
) -> None:
    where = f"trial {trial}, step {step}"
    if not math.isfinite(loss):
        raise TrainingDiverged(where, f"the loss is {loss}", _REMEDY)
    if math.isfinite(grad_norm):
        return
    if not scaler.is_enabled():
        raise TrainingDiverged(where, f"the norm of the gradients is {grad_norm}", _REMEDY)
    if scaler.get_scale() <= SMALLEST_LOSS_SCALE:
        raise TrainingDiverged(where, "the fp16 gradients overflow at every loss scale", _REMEDY)


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = AUTOCAST_DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


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


@contextmanager
def _metrics_writer(trial_dir: Path, rank: int) -> Iterator[Callable[[Event], None]]:
    """A function that appends a row to metrics.jsonl at once; rank 0 only."""
    if rank != 0:
        yield lambda row: None
        return
    with (trial_dir / METRICS_FILE).open("a", encoding="utf-8") as file:

        def write(row: Event) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        yield write


def _drop_metrics_after(path: Path, step: int) -> None:
    """Keep the rows up to `step`; later ones, and a half-written last one, are trained again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] > step:
            break
        kept.append(line + "\n")
    write_atomic(path, "".join(kept).encode())

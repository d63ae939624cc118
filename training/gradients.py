"""The gradients of one step of a pack: forward and backward, in micro-batches, over the workers.

A pack at a step in; gradients in its bank and the slots' losses out. `training.loop` takes the
steps; nothing is changed by the gradients here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from training.data.batches import CLASS_STREAM, draw_batch, of_one_shape, places_of
from training.frozen.sharding import is_sharded
from training.group import Workers
from training.losses import pack_losses
from training.pack.out_of_memory import first_words, is_out_of_memory
from training.pack.pack import Pack
from training.precision import autocast
from training.recipe import Recipe


def add_up_gradients(
    pack: Pack,
    split: Recipe,
    precision: str,
    workers: Workers,
    step_samples: int,
) -> tuple[Tensor, str | None]:
    """Compute a step forward and backward in the micro-batches of `split`; mean losses.  # (K,)

    If memory ran out on the way, the error's first words are returned beside the losses, and the
    gradients are of no use.
    """
    base, bank, slots = pack.base, pack.bank, pack.slots
    losses = torch.zeros(len(slots), device=base.device)
    # How many micro-batches a worker has on average; not a whole number where the samples cannot be
    # dealt out evenly.
    mean_share = step_samples / (split.batch_size * workers.world_size)
    try:
        for micro_step in range(split.accumulation):
            places = places_of(split, micro_step, workers.rank, workers.world_size)
            is_spare = places.start >= step_samples
            # A spare pass is computed all the same: a shared base needs every worker in every pass.
            if is_spare:
                places = range(split.batch_size)
            batches, of_class = [], []
            for slot in slots:
                counters = slot.step, places, step_samples, base.objective
                batches.append(draw_batch(slot.recipe, slot.trial.cache, *counters))
                # Either all slots have class pictures, or none has.
                if (cache := slot.trial.class_cache) is not None:
                    of_class.append(draw_batch(slot.recipe, cache, *counters, CLASS_STREAM))
            # Slots whose buckets differ in shape compute one after the other, on every worker in
            # the same order.
            for alike in of_one_shape(batches):
                own = [slots[index] for index in alike]
                theirs = [of_class[index] for index in alike if of_class]
                with bank.only(alike):
                    with autocast(base.device, precision):
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
        return losses, first_words(error)
    return losses, None


def average(
    grads: Tensor, losses: Tensor, stopping: bool, is_lacking: bool, world_size: int
) -> tuple[Tensor, bool, bool]:
    """Average the gradients over the workers, in place, and the losses.

    When one worker is to stop, or ran out of memory, all of them are told so; after a lack of
    memory the gradients are of no use. Scaled
    fp16 gradients of a slot that overflowed on one worker are infinite on all, so all skip that
    slot's step.
    """
    flags = torch.tensor([float(stopping), float(is_lacking)], device=losses.device)
    small = torch.cat([flags, losses])
    dist.all_reduce(small)
    stopping, is_lacking = (bool(flag > 0) for flag in small[:2])
    if not is_lacking:
        dist.all_reduce(grads)
        grads /= world_size
    return small[2:] / world_size, stopping, is_lacking

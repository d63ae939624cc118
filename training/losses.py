"""The losses of a pack's samples: how far the denoiser's predictions are from their targets.

A base with a bank on it, slots and their batches in, one weighted loss per sample out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from training.data.batches import Batch
from training.families import Base
from training.pack.bank import AdapterBank
from training.pack.slot import Slot
from training.schedule import sample_losses


def pack_losses(
    base: Base,
    bank: AdapterBank,
    slots: Sequence[Slot],
    batches: Sequence[Batch],
    class_batches: Sequence[Batch] = (),
) -> Tensor:
    """The weighted loss of every slot's B samples, fp32.

    `slots` are those that act in the bank, in its order; all batches are of one shape.

    `class_batches` are as many class pictures for every slot, computed in the same forward pass.
    Their squared error times `prior_weight` is added, as by diffusers' `--with_prior_preservation`:
    loss weighting, masks and pseudo-Huber loss apply to the character's pictures alone.

    # (K, B)
    """
    device, objective = base.device, base.objective
    recipes = [s.recipe for s, b in zip(slots, batches, strict=True) for _ in b.images]  # K*B
    weights = torch.cat(
        [objective.weights(s.recipe, b.timesteps) for s, b in zip(slots, batches, strict=True)]
    ).to(device)
    # 2*B rows for every slot where there are class pictures, else B.
    rows = (
        [b for pair in zip(batches, class_batches, strict=True) for b in pair]
        if class_batches
        else batches
    )
    timesteps = torch.cat([batch.timesteps for batch in rows]).to(device)  # (K*B,) or (K*2*B,)
    noise = torch.cat([batch.noise for batch in rows]).to(device)
    samples = torch.cat([batch.posterior_samples for batch in rows]).to(device)
    latents = base.to_latents(samples)  # (..., C, h, w)
    noisy = objective.noisy(latents, noise, timesteps)
    target = objective.target(latents, noise, timesteps)
    conditions = _joined([batch.conditions for batch in rows], device)
    captions = [caption for batch in rows for caption in batch.captions]
    prediction = base.predict(noisy, timesteps, _said_by_adapters(base, conditions, captions))
    errors_of_class: Tensor | None = None
    if class_batches:
        prediction, class_prediction = _own_and_class(prediction, len(slots))
        target, class_target = _own_and_class(target, len(slots))
        errors_of_class = (class_prediction - class_target).square().mean(dim=(1, 2, 3))
    errors = sample_losses(
        prediction,
        target,
        [recipe.huber_c for recipe in recipes],
        _pixel_weights(slots, batches, device),
    )  # (K*B,)
    priors = torch.tensor([recipe.prior_weight for recipe in recipes], device=device)
    if errors_of_class is not None:
        return (errors * weights + priors * errors_of_class).view(len(slots), -1)
    if slots[0].recipe.prior_weight > 0:
        conditions = _joined([batch.prior_conditions for batch in batches], device)
        captions = [caption for batch in batches for caption in batch.prior_captions]
        own = _said_by_adapters(base, conditions, captions)
        errors = errors + priors * _prior_losses(base, bank, noisy, timesteps, conditions, own)
    return (errors * weights).view(len(slots), -1)


def _said_by_adapters(
    base: Base, conditions: Mapping[str, Tensor], captions: Sequence[str]
) -> dict[str, Tensor]:
    """`conditions` with the captions encoded anew by text encoders that have adapters on them.

    Where the encoders have none, `conditions` stay as they are: the cache has them already.
    """
    said = base.encode_prompts(list(captions)) if base.text_is_adapted else {}
    return {**conditions, **said}


def _own_and_class(rows: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The rows of the characters' pictures, and those of the class pictures.

    # (K*2*B, ...) -> 2 x (K*B, ...)
    """
    by_slot = rows.unflatten(0, (slots, 2, -1))
    return by_slot[:, 0].flatten(0, 1), by_slot[:, 1].flatten(0, 1)


def _prior_losses(
    base: Base,
    bank: AdapterBank,
    noisy: Tensor,
    timesteps: Tensor,
    conditions: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> Tensor:
    """How far the adapters changed the base's prediction for the caption without the trigger.

    This is the prior preservation of DreamBooth (Ruiz et al. 2023, eq. 2) with the frozen base as
    the teacher, like OneTrainer's prior prediction: no class pictures have to be made.
    `conditions` encode that caption with the bare text encoders, `own` with their adapters.
    # (K*B,)
    """
    with torch.no_grad(), bank.off():
        target = base.predict(noisy, timesteps, conditions)
    prediction = base.predict(noisy, timesteps, own)
    return (prediction - target).square().mean(dim=(1, 2, 3))


def _pixel_weights(
    slots: Sequence[Slot], batches: Sequence[Batch], device: torch.device
) -> Tensor | None:
    """The weight of every latent cell in the loss; None if no trial masks parts of pictures.

    # (K*B, 1, h, w)
    """
    if all(slot.recipe.masked_loss is None for slot in slots):
        return None
    weights = []
    for slot, batch in zip(slots, batches, strict=True):
        hidden = 1.0 if slot.recipe.masked_loss is None else slot.recipe.masked_loss
        weights.append(hidden + (1 - hidden) * batch.masks)
    return torch.cat(weights).to(device)


def _joined(conditions: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in conditions]).to(device) for name in conditions[0]}

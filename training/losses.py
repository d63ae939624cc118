"""The loss of a pack's samples: what is asked of the denoiser, and how far its answers are off.

A base with a bank on it, slots and their batches in, one weighted loss per sample out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from training.batches import Batch
from training.families import Base
from training.pack.bank import AdapterBank
from training.pack.slot import Slot
from training.schedule import sample_losses


def pack_losses(
    base: Base, bank: AdapterBank, slots: Sequence[Slot], batches: Sequence[Batch]
) -> Tensor:
    """The weighted loss of every slot's B samples, fp32.

    `slots` are those that act in the bank, in its order; all batches are of one shape.

    # (K, B)
    """
    device, objective = base.device, base.objective
    recipes = [s.recipe for s, b in zip(slots, batches, strict=True) for _ in b.images]  # K*B
    weights = torch.cat(
        [objective.weights(s.recipe, b.timesteps) for s, b in zip(slots, batches, strict=True)]
    ).to(device)
    timesteps = torch.cat([batch.timesteps for batch in batches]).to(device)  # (K*B,)
    noise = torch.cat([batch.noise for batch in batches]).to(device)
    samples = torch.cat([batch.posterior_samples for batch in batches]).to(device)
    latents = base.to_latents(samples)  # (K*B, C, h, w)
    noisy = objective.noisy(latents, noise, timesteps)
    target = objective.target(latents, noise, timesteps)
    prediction = base.predict(noisy, timesteps, _joined([b.conditions for b in batches], device))
    errors = sample_losses(
        prediction,
        target,
        [recipe.huber_c for recipe in recipes],
        _pixel_weights(slots, batches, device),
    )  # (K*B,)
    if slots[0].recipe.prior_weight > 0:
        priors = torch.tensor([recipe.prior_weight for recipe in recipes], device=device)
        conditions = _joined([batch.prior_conditions for batch in batches], device)
        errors = errors + priors * _prior_losses(base, bank, noisy, timesteps, conditions)
    return (errors * weights).view(len(slots), -1)


def _prior_losses(
    base: Base,
    bank: AdapterBank,
    noisy: Tensor,
    timesteps: Tensor,
    conditions: Mapping[str, Tensor],
) -> Tensor:
    """How far the adapters moved what the base itself answers to the caption without the trigger.

    The prior preservation of DreamBooth (Ruiz et al. 2023, eq. 2) with the frozen base as teacher,
    as OneTrainer's prior prediction: no class pictures have to be made.  # (K*B,)
    """
    with torch.no_grad(), bank.off():
        target = base.predict(noisy, timesteps, conditions)
    prediction = base.predict(noisy, timesteps, conditions)
    return (prediction - target).square().mean(dim=(1, 2, 3))


def _pixel_weights(
    slots: Sequence[Slot], batches: Sequence[Batch], device: torch.device
) -> Tensor | None:
    """What every latent cell counts for, if any trial leaves parts of pictures out.

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

"""The training of one adapter with nothing but diffusers, PEFT and torch, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from peft import LoraConfig, get_peft_model_state_dict

from training.data.batches import draw_batch
from training.data.latents import LatentCache
from training.objective import Diffusion
from training.recipe import Recipe


def adamw(recipe: Recipe) -> Callable[[list[Any], list[Any]], torch.optim.Optimizer]:
    def make(others: list[Any], ups: list[Any]) -> torch.optim.Optimizer:
        lr, eps = recipe.optimizer.lr, recipe.optimizer.eps  # type: ignore[union-attr]
        faster = {"params": ups, "lr": lr * recipe.optimizer.lora_plus_ratio}  # type: ignore[union-attr]
        groups = [{"params": others}, faster]
        return torch.optim.AdamW(groups, lr=lr, eps=eps, weight_decay=0.01)

    return make


def peft_by_hand(
    folder: Path,
    cache: LatentCache,
    recipe: Recipe,
    make: Callable[[list[Any], list[Any]], torch.optim.Optimizer] | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training with nothing but diffusers, PEFT and torch; only the draws are shared.

    `make(others, ups)`: another optimiser than AdamW.
    """
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    objective = Diffusion(scheduler.config.prediction_type, scheduler.alphas_cumprod)
    vae_scale = 0.18215
    unet.requires_grad_(False)
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.network.rank,
        lora_alpha=recipe.network.rank if recipe.network.alpha is None else recipe.network.alpha,
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        use_dora=recipe.network.method == "dora",
        use_rslora=recipe.network.rank_stabilised,
    )
    unet.add_adapter(config)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    ups = [p for name, p in unet.named_parameters() if "lora_B" in name]
    others = [p for p in parameters if not any(p is up for up in ups)]
    optimizer = (make or adamw(recipe))(others, ups)
    history = []
    for step in range(recipe.steps):
        draws = draw_batch(recipe, cache, step, range(4), 4, objective)
        latents = draws.posterior_samples * vae_scale
        noisy = scheduler.add_noise(latents, draws.noise, draws.timesteps)
        snr = compute_snr(scheduler, draws.timesteps)
        clipped = snr.clamp(max=5.0)
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, draws.noise, draws.timesteps)
            weights = clipped / (snr + 1)
        else:
            target = draws.noise
            weights = clipped / snr
        output = unet(noisy, draws.timesteps, draws.conditions["text"], return_dict=False)[0]
        errors = torch.nn.functional.mse_loss(output, target, reduction="none")
        if (c := recipe.huber_c) is not None:  # as in sd-scripts' conditional_loss
            errors = 2 * c * (torch.sqrt((output - target) ** 2 + c**2) - c)
        loss = (errors.mean(dim=[1, 2, 3]) * weights).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    state = get_peft_model_state_dict(unet)
    return history, {f"unet.{name}": tensor for name, tensor in state.items()}

"""A base's UNet under PEFT beside the bank: the same adapter, inputs and loss for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from training.families import Base, load_base
from training.pack.adapters import initial_adapter
from training.recipe import Network

# The length of a tensor's difference relative to the tensor's length, fp32.
TOLERANCE = 1e-5
CONV = "attention+ff+conv"
# The 3 × 3 convolutions of a UNet's blocks.
KERNELS = r".*(conv1|conv2|samplers\.0\.conv)"
_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
ADDED = [
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj_in", "proj_out"),
    *("downsamplers.0.conv", "upsamplers.0.conv"),
]
ENDINGS = {
    "attention": _ATTENTION,
    "attention+ff": [*_ATTENTION, *_FEED_FORWARD],
    CONV: [*_ATTENTION, *_FEED_FORWARD, *ADDED],
}


def assert_near(found: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    scale = float(wanted.norm())
    error = float((found - wanted).norm())
    assert error <= tolerance * scale, f"{what}: {error:.3g} of {scale:.3g}"


def network(method: str = "lora", rank: int = 4, **more: Any) -> Network:
    return Network.model_validate({"method": method, "rank": rank, **more})


def inputs(base: Base, seed: int, count: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, text and a target."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, base.latent_channels, 8, 8, generator=generator)
    text = torch.randn(count, 77, 32, generator=generator)
    timesteps = torch.randint(1000, (count,), generator=generator)
    return latents, timesteps, text, torch.randn(latents.shape, generator=generator)


def shaken(base: Base, network: Network, seed: int, size: float = 0.2) -> dict[str, Tensor]:
    """An adapter in the middle of its training: nothing in it is zero."""
    generator = torch.Generator().manual_seed(seed)
    state = initial_adapter(base, network, seed)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=generator)
        if "magnitude" not in name
        else tensor * (1 + size * torch.randn(tensor.shape, generator=generator))
        for name, tensor in state.items()
    }


def peft_unet(
    folder: Path, config: Network, state: dict[str, Tensor] | None = None, seed: int = 0
) -> Any:
    """A base's UNet under PEFT, with an adapter's weights or with PEFT's own initial ones."""
    unet = load_base(folder).denoiser
    kernels: dict[str, Any] = {}
    if config.targets == CONV:
        kernels = {
            "rank_pattern": {KERNELS: config.conv_rank},
            "alpha_pattern": {KERNELS: config.conv_alpha},
        }
    if config.init == "pissa":
        kernels["init_lora_weights"] = "pissa"
    torch.manual_seed(seed)
    unet.add_adapter(
        LoraConfig(
            r=config.rank,
            lora_alpha=config.effective_alpha,
            target_modules=ENDINGS[config.targets],
            use_dora=config.method == "dora",
            use_rslora=config.rank_stabilised,
            **kernels,
        )
    )
    for name, parameter in unet.named_parameters():
        if "lora_" in name and state is not None:
            plain = name.replace(".default", "")
            plain = plain if "magnitude" not in plain else plain.removesuffix(".weight")
            parameter.data.copy_(state[f"unet.{plain}"])
    return unet


def peft_parts(unet: Any, attribute: str) -> dict[tuple[str, str], Tensor]:
    found = {}
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            module, part = name.removesuffix(".default.weight").rsplit(".", 1)
            tensor = parameter.data if attribute == "data" else parameter.grad
            found[module, part] = tensor.detach().clone()
    return found


def backward(base: Base, seeds: list[int]) -> Tensor:
    """Loss of every slot on its own samples, summed and differentiated; returns the outputs."""
    drawn = [inputs(base, seed) for seed in seeds]
    latents, timesteps, text, target = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    output = base.predict(latents, timesteps, {"text": text})
    errors = (output - target).square().mean(dim=(1, 2, 3)).view(len(seeds), -1)
    errors.mean(dim=1).sum().backward()
    return output.detach()


def built_weight(weight: Tensor, parts: dict[str, Tensor], config: Network) -> Tensor:
    """W' of LoRA or of DoRA, in full; the norms without gradient."""
    product = (parts["lora_B"].flatten(1) @ parts["lora_A"].flatten(1)).view(weight.shape)
    full = weight + config.scale * product
    if config.method == "lora":
        return full
    if config.dora_axis == "output":
        norm = torch.stack([row.detach().square().sum().sqrt() for row in full])
        ones = [1] * (full.ndim - 1)
        return full * (parts["lora_magnitude_vector"].flatten() / norm).view(-1, *ones)
    norm = torch.stack([full[:, i].detach().square().sum().sqrt() for i in range(full.shape[1])])
    ones = [1] * (full.ndim - 2)
    return full * (parts["lora_input_magnitude"].flatten() / norm).view(1, -1, *ones)

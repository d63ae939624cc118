"""Adapters on a base's UNet, through PEFT: put on, read out, put back, taken off.

A `Base` and a `Network` in, trainable fp32 parameters out. The base's own weights are never
touched: after `detach` the UNet holds the very modules and bytes it had before.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import Parameter

from captioning import UserError
from training.families import Base
from training.recipe import Network

ADAPTER_NAME = "default"
UNET_PREFIX = "unet."
# Module name endings in diffusers' UNet2DConditionModel; the same lists as its LoRA scripts.
ATTENTION_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD_MODULES = ("ff.net.0.proj", "ff.net.2")


def target_modules(network: Network) -> tuple[str, ...]:
    """The endings of the names of the linear layers that get an update."""
    if network.targets == "attention":
        return ATTENTION_MODULES
    return ATTENTION_MODULES + FEED_FORWARD_MODULES


def attach(base: Base, network: Network, seed: int) -> list[Parameter]:
    """Put a new adapter on `base.unet` and return its parameters, fp32, trainable.

    PEFT's initial weights: A Kaiming-uniform, drawn from `seed` alone (the global generator is
    left as it was), B zero, DoRA magnitudes the row norms of the base weight: the output does not
    change until the first step. Raises RuntimeError if an adapter is already on.
    """
    if is_attached(base):
        raise RuntimeError("an adapter is already on this base; detach it first")
    config = LoraConfig(
        r=network.rank,
        lora_alpha=network.effective_alpha,
        target_modules=list(target_modules(network)),
        use_dora=network.method == "dora",
        init_lora_weights=True,
    )
    base.unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        # Drawn on the CPU: the same seed gives the same adapter on every device.
        base.unet.to("cpu")
        base.unet.add_adapter(config, adapter_name=ADAPTER_NAME)
        base.unet.to(base.device)
    for parameter in adapter_parameters(base):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if network.method == "dora" and base.dtype != torch.float32:
        _set_magnitudes_in_fp32(base)
    return adapter_parameters(base)


def _set_magnitudes_in_fp32(base: Base) -> None:
    """Row norms of the half-precision weights computed in fp32, as the forward pass does."""
    for module in base.unet.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            magnitude = module.lora_magnitude_vector[ADAPTER_NAME].weight
            magnitude.data = torch.linalg.norm(weight.detach().float(), dim=1)  # (out,)


def is_attached(base: Base) -> bool:
    return any(isinstance(module, LoraLayer) for module in base.unet.modules())


def adapter_parameters(base: Base) -> list[Parameter]:
    """The adapter's parameters in the UNet's fixed module order."""
    return [parameter for _, parameter in named_adapter_parameters(base)]


def named_adapter_parameters(base: Base) -> list[tuple[str, Parameter]]:
    return [
        (name, parameter) for name, parameter in base.unet.named_parameters() if "lora_" in name
    ]


def adapter_state(base: Base) -> dict[str, Tensor]:
    """A copy of the adapter's weights under PEFT's names with the `unet.` prefix, fp32, on CPU."""
    state = get_peft_model_state_dict(base.unet, adapter_name=ADAPTER_NAME)
    return {
        UNET_PREFIX + name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in sorted(state.items())
    }


def load_adapter(base: Base, state: dict[str, Tensor], network: Network) -> list[Parameter]:
    """Put the adapter `state` (as `adapter_state` gives it) on `base`, replacing one that is on.

    Raises UserError if its names or shapes are not those of `network` on this base; the base is
    then left without an adapter.
    """
    detach(base)
    parameters = attach(base, network, seed=0)
    expected = {name: tuple(tensor.shape) for name, tensor in adapter_state(base).items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        detach(base)
        wrong = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        raise UserError(
            f"adapter: {wrong[0]}",
            f"{len(wrong)} of {len(expected)} tensors do not fit a {network.method} of rank "
            f"{network.rank} on {base.id} (here: {found.get(wrong[0], 'missing')}, expected "
            f"{expected.get(wrong[0], 'none')})",
            "use the recipe and the base that the adapter was trained with",
        )
    plain = {name.removeprefix(UNET_PREFIX): tensor for name, tensor in state.items()}
    set_peft_model_state_dict(base.unet, plain, adapter_name=ADAPTER_NAME)
    return parameters


def detach(base: Base) -> None:
    """Take the adapter off; the UNet is then bit for bit what it was. Without one: does nothing."""
    if is_attached(base):
        base.unet.unload_lora()
    base.unet.requires_grad_(False)

"""Adapters on a base: made, put on, read out under PEFT's names, taken off.

A `Base` and networks in, an `AdapterBank` on it out. The base's own weights are never
touched: after `detach` it holds the very modules and bytes it had before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from captioning import UserError
from training.families import Base
from training.frozen.sharding import whole
from training.pack.bank import AdapterBank, install, uninstall
from training.pack.encoders import encoder_layers, install_on_encoders, uninstall_from_encoders
from training.pack.layer import BankLayer
from training.pack.parts import (
    DOWN,
    UP,
    Layer,
    Parts,
    axes_under,
    has_kernel,
    is_of_encoder,
    network_of,
    part_shape,
    parts_of,
    refuse_unknown_kernels,
    weight_shape,
)
from training.pack.principal import principal_factors, refuse_missing_values
from training.recipe import CONV_PRESET, Network


def target_modules(base: Base, network: Network) -> tuple[str, ...]:
    """The endings of the names of the layers that get an update, for a preset."""
    if network.targets == "attention":
        return base.attention_modules
    linear = base.attention_modules + base.feed_forward_modules
    return linear + base.convolution_modules if network.targets == CONV_PRESET else linear


def target_layers(base: Base, network: Network) -> dict[str, Layer]:
    """The layers of the denoiser that get an update, by name, in the denoiser's order.

    Raises UserError when a regular expression names none, one of `base.unbatched_modules`, or a
    convolution that cannot have one.
    """
    pattern = network.target_pattern
    endings = () if pattern else tuple(f".{end}" for end in target_modules(base, network))
    layers = {}
    for name, module in base.denoiser.named_modules():
        inner = module.base_layer if isinstance(module, BankLayer) else module
        wanted = pattern.search(name) if pattern else name.endswith(endings)
        if isinstance(inner, (nn.Linear, nn.Conv2d)) and wanted:
            if name.startswith(base.unbatched_modules):
                raise UserError(
                    "recipe: network.targets",
                    f"{network.targets} names {name}, which no adapter can be trained on here",
                    "write the pattern so that it passes over this layer",
                )
            refuse_unknown_kernels(name, inner)
            layers[name] = inner
    if not layers:
        raise UserError(
            "recipe: network.targets",
            f"{network.targets} names no linear layer and no convolution of {base.id}",
            f"match module names such as {_some_linear(base)}, or use a preset",
        )
    kernels = any(has_kernel(weight_shape(layer)) for layer in layers.values())
    if not kernels and network.of_kernels() != network:
        raise UserError(
            "recipe: network.conv_rank, network.conv_alpha",
            f"are of convolutions, and {network.targets} names none of more than one cell",
            "leave them out",
        )
    return layers


def _some_linear(base: Base) -> str:
    names = [n for n, module in base.denoiser.named_modules() if isinstance(module, nn.Linear)]
    return next((name for name in names if name.endswith("to_q")), names[0])


def adapted_layers(base: Base, network: Network) -> dict[str, Layer]:
    """All layers that get an update, as a bank calls them: the denoiser's, then the encoders'.

    Raises UserError like `target_layers`.
    """
    return target_layers(base, network) | encoder_layers(base, network)


def check_layers(base: Base, network: Network) -> None:
    """Raise UserError where `initial_adapter` would.

    Only names and shapes of the layers are looked at, so `base` may be on `meta`.
    """
    for name, layer in adapted_layers(base, network).items():
        if network.init == "pissa":
            refuse_missing_values(name, layer, network_of(network, name, weight_shape(layer)))


def initial_adapter(base: Base, network: Network, seed: int) -> dict[str, Tensor]:
    """The adapter before its first step, as `adapter_state` gives it: it changes no output yet.

    The weights are PEFT's initial ones, number for number: A is Kaiming-uniform, drawn on the CPU
    from `seed` alone, B is zero, and DoRA's magnitudes are the norms of the base weight's rows or
    columns, or of a convolution's channels. With PiSSA, A and B are taken from the base weight
    itself, and their product is subtracted again: see `principal_factors`.

    Raises UserError for a PiSSA whose rank is larger than that of a layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        tensor = torch.empty(shape)
        return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)

    parts: Parts = {}
    for name, layer in adapted_layers(base, network).items():
        own = network_of(network, name, weight_shape(layer))
        down_shape = part_shape(DOWN, own.rank, layer)
        up_shape = part_shape(UP, own.rank, layer)
        # PEFT creates its two layers first, and each of them draws weights that PEFT then replaces.
        draw(*down_shape), draw(*up_shape)
        parts[name, DOWN] = draw(*down_shape)
        parts[name, UP] = torch.zeros(up_shape)
        if network.init == "pissa":
            parts[name, DOWN], parts[name, UP] = principal_factors(name, layer, own)
        for part in parts_of(network)[2:]:
            weight = whole(layer.weight).float()
            norms = torch.linalg.vector_norm(weight, dim=axes_under(part, layer)).cpu()
            parts[name, part] = norms.view(part_shape(part, own.rank, layer))
    return {state_name(base.denoiser_name, *key): tensor for key, tensor in sorted(parts.items())}


def attach_pack(
    base: Base, adapters: Sequence[tuple[Network, Mapping[str, Tensor]]]
) -> AdapterBank:
    """Put adapters with these networks and states (as `adapter_state` gives them) on the base.

    The networks may differ in all but `targets` and whether they have a `text_encoder`. Raises
    RuntimeError if a bank is already on, ValueError for networks that differ there, and UserError
    if a state's names or shapes are not those of its network on this base; the base is then left
    without adapters.
    """
    if is_attached(base):
        raise RuntimeError("an adapter is already on this base; detach it first")
    if len({(network.targets, network.text_encoder is None) for network, _ in adapters}) != 1:
        raise ValueError(
            "the adapters of a pack must have the same targets, text encoders included"
        )
    base.denoiser.requires_grad_(False)
    layers = adapted_layers(base, adapters[0][0])
    for network, state in adapters:
        _check(base, layers, network, state)
    networks = [network for network, _ in adapters]
    bank = AdapterBank(layers, networks, base.denoiser_name, base.device)
    for slot, (_, state) in enumerate(adapters):
        own = bank.split(slot, bank.weights[slot])
        bank.load(slot, {key: state[state_name(base.denoiser_name, *key)] for key in own})
    of_denoiser = {name: layer for name, layer in layers.items() if not is_of_encoder(name)}
    install(base.denoiser, of_denoiser, bank)
    install_on_encoders(base, layers, bank)
    return bank


def attach(base: Base, network: Network, seed: int) -> AdapterBank:
    """Put one new adapter on `base`; see `initial_adapter` and `attach_pack`."""
    return attach_pack(base, [(network, initial_adapter(base, network, seed))])


def load_adapter(base: Base, state: Mapping[str, Tensor], network: Network) -> AdapterBank:
    """Put the adapter `state` (as `adapter_state` gives it) on `base`, replacing what is on."""
    detach(base)
    return attach_pack(base, [(network, state)])


def _check(
    base: Base, layers: Mapping[str, Layer], network: Network, state: Mapping[str, Tensor]
) -> None:
    """Raise UserError for the first tensor that is missing, foreign, or of another shape."""
    expected = {
        state_name(base.denoiser_name, name, part): part_shape(
            part, network_of(network, name, weight_shape(layer)).stored_rank, layer
        )
        for name, layer in layers.items()
        for part in parts_of(network)
    }
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected == found:
        return
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    raise UserError(
        f"adapter: {wrong[0]}",
        f"{len(wrong)} of {len(expected)} tensors do not fit a {network.method} of rank "
        f"{network.stored_rank} on {base.id} (here: {found.get(wrong[0], 'missing')}, expected "
        f"{expected.get(wrong[0], 'none')})",
        "use the recipe and the base that the adapter was trained with",
    )


def bank_on(base: Base) -> AdapterBank | None:
    """The bank that is on the base's denoiser; None without one."""
    for module in base.denoiser.modules():
        if isinstance(module, BankLayer):
            return module.bank
    return None


@contextmanager
def cut_at(base: Base, rank: int) -> Iterator[None]:
    """Within the block, let the adapter that acts alone on `base` act with its first `rank` ranks.

    Raises RuntimeError when no adapter acts alone.
    """
    bank = bank_on(base)
    if bank is None:
        raise RuntimeError("no adapter is on this base")
    if len(bank.acting_slots) != 1:
        raise RuntimeError("no adapter acts alone")
    with bank.at_rank(bank.acting_slots[0], rank):
        yield


def is_attached(base: Base) -> bool:
    return bank_on(base) is not None


def adapter_state(bank: AdapterBank, slot: int = 0, row: Tensor | None = None) -> dict[str, Tensor]:
    """A copy of a slot's weights under PEFT's names with their component's prefix, fp32, on CPU.

    `row`: weights to read in place of the bank's own.  # (P,)
    """
    parts = bank.adapter(slot, bank.weights[slot] if row is None else row)
    return {
        state_name(bank.component, *key): tensor.detach()
        .to("cpu", torch.float32, copy=True)
        .contiguous()
        for key, tensor in sorted(parts.items())
    }


def state_name(denoiser: str, layer: str, part: str) -> str:
    """The name of a tensor in an adapter's state: PEFT's, where PEFT has the part.

    `denoiser` is the denoiser's name, which a bank's names of its layers lack.
    """
    name = layer if is_of_encoder(layer) else f"{denoiser}.{layer}"
    return f"{name}.{part}" + (".weight" if part in (DOWN, UP) else "")


def detach(base: Base) -> None:
    """Take the adapters off, if there are any; the base is then bit for bit what it was.

    Also takes off what PEFT or diffusers' own loader put on the denoiser.
    """
    uninstall(base.denoiser)
    uninstall_from_encoders(base)
    if getattr(base.denoiser, "peft_config", None):
        base.denoiser.unload_lora()
    base.denoiser.requires_grad_(False)

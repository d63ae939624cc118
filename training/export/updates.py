"""An adapter's weights as updates of single layers, free of any naming scheme.

A checkpoint's adapter state and its network in, one `Update` per layer out, with the scale
alpha/rank folded in, so that no reader has to know alpha. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from captioning import UserError
from training.pack.parts import (
    DOWN,
    INPUT_MAGNITUDE,
    MAGNITUDES,
    UP,
    is_of_encoder,
    network_of,
    parts_of,
)
from training.pack.pissa import small_factors
from training.recipe import Network

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
# transformers 5.6 dropped this level from CLIPTextModel; every tool still expects it.
_TEXT_MODEL = "text_model."


@dataclass(frozen=True)
class Update:
    """One layer's update, fp32: V = W + up·down, and with a magnitude m·V/‖V‖.

    For a convolution the tensors have PEFT's shapes, and V has kernels flattened behind their first
    axis: down (r, in, k, k), up (out, r, 1, 1), magnitude (1, out or in, 1, 1).
    """

    component: str  # of COMPONENTS
    module: str  # dotted name in the component
    down: Tensor  # (r, in)
    up: Tensor  # (out, r), times alpha/rank
    magnitude: Tensor | None  # DoRA: (out,) with a norm per row, or (in,) with one per column
    by_input: bool = False  # the magnitude is per column, or input channel

    def merged_difference(self, weight: Tensor) -> Tensor:
        """What the update adds to the base's `weight`, exactly, DoRA included.  # as `weight`

        DoRA is Liu et al. 2024, eq. 5: W' = m·(W + BA)/‖W + BA‖, the norm over every output row
        as in PEFT, or over every input column.
        """
        product = self.up.double().flatten(1) @ self.down.double().flatten(1)
        direction = weight.double() + product.view(weight.shape)
        if self.magnitude is not None:
            own = int(self.by_input)
            others = [axis for axis in range(weight.ndim) if axis != own]
            norm = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
            direction = direction * (self.magnitude.double().view(norm.shape) / norm)
        return (direction - weight.double()).float()


def file_module(component: str, module: str) -> str:
    """The module's dotted name as files have it, whatever the library calls it."""
    if is_of_encoder(component) and not module.startswith(_TEXT_MODEL):
        return _TEXT_MODEL + module
    return module


def read_updates(state: Mapping[str, Tensor], network: Network) -> list[Update]:
    """The updates of an adapter `state` under PEFT's names, by component and module.

    Raises UserError for a key that belongs to no complete update, for values that are not finite,
    and for shapes that are of neither a linear layer nor a convolution.
    """
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in state.items():
        component, module, part = _split(key)
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"adapter: {key}",
                "holds values that are not finite",
                "export an earlier checkpoint, and train with a lower learning rate",
            )
        parts.setdefault((component, module), {})[part] = tensor.detach().cpu().float()
    expected = set(parts_of(network))
    updates = []
    for (component, module), tensors in sorted(parts.items()):
        down, up = tensors.get(DOWN), tensors.get(UP)
        if down is None or up is None or tensors.keys() != expected:
            raise UserError(
                f"adapter: {component}.{module}",
                f"has {', '.join(sorted(tensors))}, expected {', '.join(sorted(expected))}",
                "use the recipe that the adapter was trained with",
            )
        ones = (1,) * (down.ndim - 2)
        if down.ndim not in (2, 4) or tuple(up.shape[1:]) != (len(down), *ones):
            raise UserError(
                f"adapter: {component}.{module}",
                f"shapes {tuple(down.shape)} and {tuple(up.shape)} are no update of a linear layer "
                "or a convolution",
                "export a checkpoint as training wrote it",
            )
        own = network_of(network, component, down.shape)
        magnitudes = [tensors[part] for part in MAGNITUDES.values() if part in tensors]
        magnitude = magnitudes[0] if magnitudes else None
        by_input = INPUT_MAGNITUDE in tensors
        if network.init == "pissa":
            # The product is the same; the other factors would be rounded as large as the weight.
            down, up = small_factors(down, up)
        updates.append(Update(component, module, down, up * own.scale, magnitude, by_input))
    return updates


def _split(key: str) -> tuple[str, str, str]:
    """`unet.a.b.lora_A.weight` as ("unet", "a.b", "lora_A"); UserError if it has another form."""
    component, _, rest = key.partition(".")
    names = rest.removesuffix(".weight").split(".")
    parts = (DOWN, UP, *MAGNITUDES.values())
    if component not in COMPONENTS or len(names) < 2 or names[-1] not in parts:
        raise UserError(
            f"adapter: {key}",
            "is no weight of a LoRA or DoRA on the denoiser or the text encoder",
            "export a checkpoint as training wrote it",
        )
    return component, ".".join(names[:-1]), names[-1]

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
from training.recipe import Network

COMPONENTS = ("unet", "text_encoder")
_DOWN, _UP, _MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"


@dataclass(frozen=True)
class Update:
    """One linear layer's update, fp32: V = W + up·down, and with a magnitude m·V/‖V‖ per row."""

    component: str  # of COMPONENTS
    module: str  # dotted name in the component
    down: Tensor  # (r, in)
    up: Tensor  # (out, r), times alpha/rank
    magnitude: Tensor | None  # (out,); DoRA, output axis as in PEFT

    def merged_difference(self, weight: Tensor) -> Tensor:
        """What the update adds to the base's `weight`, exactly, DoRA included.  # (out, in)

        DoRA is Liu et al. 2024, eq. 5: W' = m·(W + BA)/‖W + BA‖, the norm over every output row.
        """
        direction = weight.double() + self.up.double() @ self.down.double()
        if self.magnitude is not None:
            norm = torch.linalg.norm(direction, dim=1)  # (out,)
            direction = direction * (self.magnitude.double() / norm)[:, None]
        return (direction - weight.double()).float()


def read_updates(state: Mapping[str, Tensor], network: Network) -> list[Update]:
    """The updates of an adapter `state` under PEFT's names, by component and module.

    Raises UserError for a key that belongs to no complete update, for values that are not finite,
    and for layers that are not linear.
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
    expected = {_DOWN, _UP} | ({_MAGNITUDE} if network.method == "dora" else set())
    scale = network.effective_alpha / network.rank
    updates = []
    for (component, module), tensors in sorted(parts.items()):
        down, up = tensors.get(_DOWN), tensors.get(_UP)
        if down is None or up is None or tensors.keys() != expected:
            raise UserError(
                f"adapter: {component}.{module}",
                f"has {', '.join(sorted(tensors))}, expected {', '.join(sorted(expected))}",
                "use the recipe that the adapter was trained with",
            )
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise UserError(
                f"adapter: {component}.{module}",
                f"shapes {tuple(down.shape)} and {tuple(up.shape)} are no update of a linear layer",
                "export adapters on linear layers; others have no verified form yet",
            )
        updates.append(Update(component, module, down, up * scale, tensors.get(_MAGNITUDE)))
    return updates


def _split(key: str) -> tuple[str, str, str]:
    """`unet.a.b.lora_A.weight` as ("unet", "a.b", "lora_A"); UserError if it has another form."""
    component, _, rest = key.partition(".")
    names = rest.removesuffix(".weight").split(".")
    if component not in COMPONENTS or len(names) < 2 or names[-1] not in (_DOWN, _UP, _MAGNITUDE):
        raise UserError(
            f"adapter: {key}",
            "is no weight of a LoRA or DoRA on the UNet or the text encoder",
            "export a checkpoint as training wrote it",
        )
    return component, ".".join(names[:-1]), names[-1]

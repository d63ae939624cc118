"""PiSSA's first factors: the largest singular values and vectors of a layer's weight.

A frozen layer and a network in, factors on the CPU out. Decomposing a large model takes minutes, so
a layer's result is kept for the other trials on the same base, as long as the layer lives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from captioning import UserError
from training.frozen.sharding import whole
from training.pack.parts import (
    DOWN,
    UP,
    Layer,
    has_kernel,
    is_of_encoder,
    part_shape,
    weight_shape,
)
from training.recipe import Network


@dataclass(frozen=True)
class _Principal:
    """The first terms of U·S·Vᵀ, fp32 on the CPU."""

    version: int  # the weight's own count of its changes
    left: Tensor  # (out, n)
    values: Tensor  # (n,), falling
    right: Tensor  # (n, in)


_known: WeakKeyDictionary[Layer, _Principal] = WeakKeyDictionary()


def principal_factors(name: str, layer: Layer, network: Network) -> tuple[Tensor, Tensor]:
    """A over A0 and (B, -B0), where A is still A0 and B is still B0.

    Meng et al. 2024 ("PiSSA", eq. 2 and 3), with the scale s of the update as in PEFT: from the r
    largest values of W = U·S·Vᵀ, A0 = √(S/s)·Vᵀ and B0 = U·√(S/s). The paper trains
    s·B·A on W - s·B0·A0. The base is not changed here, so the update is s·(B·A - B0·A0), to which
    PEFT converts on saving. A kernel is taken as the matrix that is flattened behind its first
    axis. `network` has the rank and alpha of such layers. Raises UserError if the layer `name` has
    fewer than r values.
    # (2r, in), (out, 2r); kernels in the shapes of files
    """
    refuse_missing_values(name, layer, network)
    found = _decompose(layer, network.rank)
    roots = (found.values[: network.rank] / network.scale).sqrt()
    down = roots[:, None] * found.right[: network.rank]
    up = found.left[:, : network.rank] * roots
    return (
        torch.cat([down, down]).view(part_shape(DOWN, 2 * network.rank, layer)),
        torch.cat([up, -up], dim=1).view(part_shape(UP, 2 * network.rank, layer)),
    )


def refuse_missing_values(name: str, layer: Layer, network: Network) -> None:
    """UserError if the layer `name` has fewer singular values than `network`'s rank.

    `network` has the rank of such layers. Only the shape of the weight is looked at.
    """
    outputs, *columns = weight_shape(layer)
    most = min(outputs, math.prod(columns))
    if network.rank > most:
        of_kernel = has_kernel(weight_shape(layer)) and network.conv_rank is not None
        field = "text_encoder.rank" if is_of_encoder(name) else "conv_rank" if of_kernel else "rank"
        raise UserError(
            f"recipe: network.{field}",
            f"{network.rank}, but {name} has {most} singular values to start from",
            f"set it to {most} or less, or network.init to default",
        )


def _decompose(layer: Layer, rank: int) -> _Principal:
    """The first terms, `rank` or more of them."""
    known = _known.get(layer)
    version = layer.weight._version
    if known is not None and known.version == version and len(known.values) >= rank:
        return known
    weight = whole(layer.weight).flatten(1).float().cpu()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    left, right = left[:, :rank], right[:rank]
    # A pair of singular vectors has no sign of its own, and libraries differ in it: the largest
    # number of every right one is positive here.
    signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()  # (rank, 1)
    found = _Principal(version, left * signs.T, values[:rank].clone(), right * signs)
    _known[layer] = found
    return found

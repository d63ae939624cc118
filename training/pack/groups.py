"""Layers of one shape, which a bank computes together, and where their updates lie in a row.

Layers and the slots' networks in, groups out, which the bank reads and writes its rows by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.frozen.sharding import whole
from training.pack.parts import (
    DOWN,
    MAGNITUDES,
    UP,
    Layer,
    axes_under,
    flat_shape,
    is_of_encoder,
    network_of,
    parts_of,
    weight_shape,
)
from training.recipe import Network


@dataclass(frozen=True)
class Group:
    """The L layers of one shape and of one kind."""

    of_encoder: bool  # of text encoders, not of the denoiser
    indices: tuple[int, ...]  # of its layers in the bank
    names: tuple[str, ...]
    layers: tuple[Layer, ...]
    networks: tuple[Network, ...]  # of the slots, with their ranks and alphas on such layers
    scales: Tensor  # (K, 1, 1)
    columns: Mapping[str, slice]  # part -> its columns in a row
    shapes: Mapping[str, tuple[int, ...]]  # part -> its flat shape in one layer, rank padded
    squares: Mapping[str, Tensor]  # magnitude -> the weights' squared norms, (L, out or in)

    def view(self, rows: Tensor, part: str) -> Tensor:
        """One part of the updates of all slots and layers, as a view of the rows.  # (K, L, ...)"""
        block = rows[:, self.columns[part]]
        return block.view(len(rows), len(self.layers), *self.shapes[part])

    @property
    def cells(self) -> int:
        """The cells of the layers' kernel; 1 for linear layers."""
        return math.prod(weight_shape(self.layers[0])[2:])


def groups_of(
    layers: Mapping[str, Layer], networks: Sequence[Network], device: torch.device
) -> list[Group]:
    """The layers of a bank in groups; a row holds the parts of one group after the other."""
    used = {part for network in networks for part in parts_of(network)}
    magnitudes = [magnitude for magnitude in MAGNITUDES.values() if magnitude in used]
    parts = [DOWN, UP, *magnitudes]
    alike: dict[tuple[bool, tuple[int, ...]], list[int]] = {}
    names, modules = list(layers), list(layers.values())
    for index, (name, layer) in enumerate(layers.items()):
        alike.setdefault((is_of_encoder(name), weight_shape(layer)), []).append(index)
    groups, start = [], 0
    for (of_encoder, shape), indices in alike.items():
        own = tuple(modules[index] for index in indices)
        on_such = tuple(network_of(network, names[indices[0]], shape) for network in networks)
        rank = max(network.stored_rank for network in on_such)
        shapes = {part: flat_shape(part, rank, own[0]) for part in parts}
        columns = {}
        for part, flat in shapes.items():
            columns[part] = slice(start, start + len(own) * math.prod(flat))
            start = columns[part].stop
        group = Group(
            of_encoder=of_encoder,
            indices=tuple(indices),
            names=tuple(names[index] for index in indices),
            layers=own,
            networks=on_such,
            scales=torch.tensor([network.scale for network in on_such], device=device).view(
                -1, 1, 1
            ),
            columns=columns,
            shapes=shapes,
            squares={
                magnitude: torch.stack([_squares(layer, magnitude) for layer in own])
                for magnitude in magnitudes
            },
        )
        groups.append(group)
    return groups


def _squares(layer: Layer, magnitude: str) -> Tensor:
    """The squared norms of the layer's weight along the axis of `magnitude`, fp32."""
    return whole(layer.weight).float().square().sum(axes_under(magnitude, layer))

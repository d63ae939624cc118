"""K adapters over one frozen model: their weights, and what every adapted layer computes with.

Linear layers, convolutions and networks in; the layers then give every slot's adapter its own
share of the batch. A slot's weights are one row of a matrix, so that its optimiser, norm and
clipping are single operations; the layers read blocks of all slots that are made from the rows once
per step.
Ranks are padded to the largest: the padding is zero, its gradients are zero, and so it stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from training.frozen.sharding import whole
from training.pack.choice import Slots, is_run, of_slots, put_slots
from training.pack.conv import BankConv, by_cell, by_channel
from training.pack.groups import Group, groups_of
from training.pack.layer import BankLayer, BankLinear, LayerTensors
from training.pack.norms import input_norms, output_norms
from training.pack.parts import (
    DOWN,
    INPUT_MAGNITUDE,
    MAGNITUDES,
    OUTPUT_MAGNITUDE,
    UP,
    Layer,
    Parts,
    is_of_encoder,
    parts_of,
    unpadded,
)
from training.pack.pissa import FirstFactors, stacked, unstacked
from training.recipe import Network

# In the order of `LayerTensors`.
GAINS = (INPUT_MAGNITUDE, OUTPUT_MAGNITUDE)

# torch.nn.utils.clip_grad_norm_ adds the same number to the norm.
CLIP_EPS = 1e-6


class AdapterBank:
    """K adapters on `layers`; see the module's docstring."""

    def __init__(
        self,
        layers: Mapping[str, Layer],
        networks: Sequence[Network],
        component: str = "unet",
        device: torch.device | None = None,
    ) -> None:
        """`layers` of `component` and of text encoders by name (`parts.TEXT_ENCODER`), on one
        device. Weights are zero until `load`.

        `device` is where they compute, if not where their weights are (in the host's memory).
        """
        self.component = component
        self.device = device or next(iter(layers.values())).weight.device
        self.networks = tuple(networks)
        # Makes the layers' outputs part of the graph, although nothing of the base is trained.
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        self._dora_slots = {
            magnitude: tuple(k for k, own in enumerate(networks) if magnitude in parts_of(own))
            for magnitude in MAGNITUDES.values()
        }
        # 1 for slots without the magnitude, which compute as if it were the norm.  # (K, 1)
        self._others = {
            magnitude: torch.tensor(
                [[float(k not in slots)] for k in range(len(networks))], device=self.device
            )
            for magnitude, slots in self._dora_slots.items()
        }
        self._groups = groups_of(layers, networks, self.device)
        width = max(columns.stop for group in self._groups for columns in group.columns.values())
        self.weights = torch.zeros(len(networks), width, device=self.device)  # (K, P), fp32
        self.grads = torch.zeros_like(self.weights)
        self._added = [self._added_in(group) for group in self._groups]
        self._first: FirstFactors | None = None
        if any(network.init == "pissa" for network in networks):
            self._first = FirstFactors(networks, self.weights, self._split)
        self._acting: Tensor | None = None  # the rows that the layers compute with
        self._of_encoder = [is_of_encoder(name) for name in layers]
        self._norms: dict[int, dict[str, Tensor]] = {}  # by group and magnitude, (L, K, dim)
        self._tensors: dict[tuple[torch.dtype, Slots, bool], dict[int, LayerTensors]] = {}
        self._slots: Slots = None  # the slots that act; None: all
        # slot -> the rank that it acts with, if that is not its own
        self._cuts: dict[int, int] = {}
        # Where layers add up gradients for slots with gaps between them, by group and part.
        self._gathered: dict[Slots, list[dict[str, Tensor]]] = {}
        self.is_off = False

    def _added_in(self, group: Group) -> dict[str, Tensor]:
        """The tensors in which a group's layers add up gradients, by part.  # (L, K, ...)

        They are views of `grads`, except for DOWN of kernels, which layers take `by_cell`.
        """
        added = {part: group.view(self.grads, part).transpose(0, 1) for part in group.shapes}
        if group.cells > 1:
            added[DOWN] = by_cell(added[DOWN], group.cells)
        return added

    # The weights of one slot, in the shapes of its own rank.

    def split(self, slot: int, row: Tensor) -> Parts:
        """A row of `weights`, or of something like it, as the parts of the slot's updates."""
        return self._split(slot, row, stored=False)

    def _split(self, slot: int, row: Tensor, stored: bool) -> Parts:
        """As `split`; with `stored`, PiSSA's parts have the shapes that they have in files."""
        parts = {}
        for group in self._groups:
            network = group.networks[slot]
            rank = network.stored_rank if stored else network.rank
            for part in parts_of(network):
                block = group.view(row[None], part)[0]  # (L, ...)
                for name, layer, tensor in zip(group.names, group.layers, block, strict=True):
                    parts[name, part] = unpadded(tensor, part, rank, layer)
        return parts

    def join(self, slot: int, parts: Parts) -> Tensor:
        """The row whose `split` is `parts`; zero where the slot has nothing.  # (P,)"""
        row = torch.zeros_like(self.weights[slot])
        for key, tensor in self.split(slot, row).items():
            tensor.copy_(parts[key])
        return row

    def adapter(self, slot: int, row: Tensor) -> Parts:
        """The slot's adapter with `row` as its weights: their parts, and PiSSA's first factors."""
        parts = self.split(slot, row)
        return parts if self._first is None else stacked(parts, self._first.of(slot))

    def load(self, slot: int, parts: Parts) -> None:
        """Put an adapter, as `adapter` gives it, into a slot."""
        if self._first is not None and self.networks[slot].init == "pissa":
            parts, first = unstacked(parts)
            self._first.put(slot, first)
        self.weights[slot] = self.join(slot, parts)
        self.changed()

    def slot_bytes(self) -> int:
        """The bytes of one slot's weights and gradients, the same for all: ranks are padded.

        Gradients of kernels are there twice: as the layers add them up, and for the optimiser.
        """
        kernels = sum(grad[:, 0].nbytes for grad in self._kernel_grads())
        return self.weights[0].nbytes + self.grads[0].nbytes + kernels

    # The tensors that the layers compute with.

    def changed(self) -> None:
        """To be called after every change of `weights`."""
        self._acting = None
        self._norms.clear()
        self._tensors.clear()
        self._gathered.clear()

    @contextmanager
    def only(self, slots: Sequence[int]) -> Iterator[None]:
        """Within the block the batch's rows go to these slots (ascending), equally many to each.

        Gradients of what is computed within are to be taken within, too.
        """
        chosen = tuple(slots)
        before = self._slots
        self._slots = None if len(chosen) == len(self.networks) else chosen
        try:
            yield
        finally:
            self._slots = before

    @property
    def acting_slots(self) -> tuple[int, ...]:
        """The slots that the batch's rows go to now."""
        return tuple(range(len(self.networks))) if self._slots is None else self._slots

    def cut(self, slot: int, rank: int | None) -> None:
        """From here on, let the slot act and be trained with its first `rank` ranks alone.

        With None it has all of them. The scale stays that of the whole adapter, so that the update
        of a smaller rank is a part of the sum that makes a larger one. Gradients of the other ranks
        are zero.
        """
        if self._cuts.get(slot) == rank:
            return
        if rank is None:
            del self._cuts[slot]
        else:
            self._cuts[slot] = rank
        self.changed()

    @contextmanager
    def at_rank(self, slot: int, rank: int | None) -> Iterator[None]:
        """Within the block the slot is cut at `rank`, or whole when that is None."""
        before = self._cuts.get(slot)
        self.cut(slot, rank)
        try:
            yield
        finally:
            self.cut(slot, before)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the base answers as without adapters."""
        before, self.is_off = self.is_off, True
        try:
            yield
        finally:
            self.is_off = before

    def layer_tensors(self, index: int, dtype: torch.dtype) -> LayerTensors:
        """The tensors of layer `index`, made once for each state of the weights.

        The denoiser's tensors are made apart from those of text encoders: where workers share the
        denoiser's weights, all of them must gather them together, in its forward pass.
        """
        key = (dtype, self._slots, self._of_encoder[index])
        if key not in self._tensors:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._tensors[key] = self._make_tensors(*key)
        return self._tensors[key][index]

    def _make_tensors(
        self, dtype: torch.dtype, slots: Slots, of_encoder: bool
    ) -> dict[int, LayerTensors]:
        tensors: dict[int, LayerTensors] = {}
        for number, (group, grads) in enumerate(
            zip(self._groups, self._grads_of(slots), strict=True)
        ):
            if group.of_encoder != of_encoder:
                continue
            down, up = self._block(group, DOWN), self._block(group, UP)
            if number not in self._norms:
                self._norms[number] = self._group_norms(group, down, up)
            norms = self._norms[number]
            # One entry per layer: the factors, the gains, and the gradients of both.
            columns: list[Sequence[Tensor | None]] = [
                of_slots(by_cell(down, group.cells), slots).to(dtype).unbind(),
                of_slots(up, slots).to(dtype).unbind(),
            ]
            used = [m in norms and self._is_used(m, slots) for m in GAINS]
            for magnitude, is_used in zip(GAINS, used, strict=True):
                gains = of_slots(self._gains(group, magnitude, norms), slots) if is_used else None
                columns.append(_unbound(gains, group))
            columns += [grads[part].unbind() for part in (DOWN, UP)]
            for magnitude, is_used in zip(GAINS, used, strict=True):
                columns.append(_unbound(grads[magnitude] if is_used else None, group))
            for index, *own in zip(group.indices, *columns, strict=True):
                tensors[index] = LayerTensors(*own)
        return tensors

    def _is_used(self, magnitude: str, slots: Slots) -> bool:
        return slots is None or any(magnitude in parts_of(self.networks[k]) for k in slots)

    def _grads_of(self, slots: Slots) -> list[dict[str, Tensor]]:
        """Where layers add up the slots' gradients, by group and part.  # (L, n, ...)"""
        if slots in self._gathered:
            return self._gathered[slots]
        found = [
            {part: of_slots(grad, slots) for part, grad in added.items()} for added in self._added
        ]
        if slots is not None and not is_run(slots):
            found = [{part: torch.zeros_like(grad) for part, grad in own.items()} for own in found]
            self._gathered[slots] = found
        return found

    def _block(self, group: Group, part: str) -> Tensor:
        """A part of all layers as they need it, contiguous, scale folded in.  # (L, K, ...)"""
        if self._acting is None:
            rows = self.weights if self._first is None else self._first.acting(self.weights)
            self._acting = self._cut_rows(rows) if self._cuts else rows
        block = group.view(self._acting, part).transpose(0, 1)
        return block * group.scales if part == UP else block.contiguous()

    def _cut_rows(self, rows: Tensor) -> Tensor:
        """The rows with zeros in the ranks that slots do not act with.  # (K, P)"""
        rows = rows.clone()
        for group in self._groups:
            for slot, rank in self._cuts.items():
                group.view(rows, DOWN)[slot, :, rank:] = 0  # (L, R, in)
                group.view(rows, UP)[slot, :, :, rank:] = 0  # (L, out, R)
        return rows

    def _group_norms(self, group: Group, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """The norms that a group's magnitudes are divided by, infinite where a slot has none.

        `down` and `up` are the group's blocks.  # (L, K, ...) -> (L, K, dim) each
        """
        norms = {}
        for magnitude, squares in group.squares.items():
            slots = self._dora_slots[magnitude]
            compute = output_norms if magnitude == OUTPUT_MAGNITUDE else input_norms
            # One weight at a time, since weights of a shared or quantised base are copies.
            weights = (whole(layer.weight).flatten(1) for layer in group.layers)
            own = of_slots(down, slots).contiguous(), of_slots(up, slots)
            size = len(group.layers), len(self.networks), squares.shape[-1]
            norms[magnitude] = torch.full(size, torch.inf, device=self.device)
            put_slots(norms[magnitude], slots, compute(weights, squares, *own))
        return norms

    def _gains(self, group: Group, magnitude: str, norms: Mapping[str, Tensor]) -> Tensor:
        """Magnitude/norm where a slot has a magnitude, and exactly 1 elsewhere.  # (L, K, dim)"""
        gains = group.view(self.weights, magnitude).transpose(0, 1) / norms[magnitude]
        return gains + self._others[magnitude]

    # Gradients.

    def zero_grad(self) -> None:
        """Forget all gradients."""
        gathered = (grads.values() for groups in self._gathered.values() for grads in groups)
        for grad in (self.grads, *self._kernel_grads(), *chain.from_iterable(gathered)):
            grad.zero_()

    def _kernel_grads(self) -> list[Tensor]:
        """The gradients that layers add up outside of `grads`."""
        both = zip(self._groups, self._added, strict=True)
        return [added[DOWN] for group, added in both if group.cells > 1]

    def collect_gradients(self) -> None:
        """Turn what the layers have added up since `zero_grad` into gradients of `weights`, once.

        The chain rule asks for the scale on B's gradient and for 1/norm on a magnitude's.
        """
        if len(self._norms) < len(self._groups):
            raise RuntimeError("the weights have changed since the layers added up gradients")
        for number, (group, added) in enumerate(zip(self._groups, self._added, strict=True)):
            norms = self._norms[number]
            for part, grad in added.items():
                for slots, gathered in self._gathered.items():
                    own = torch.tensor(slots, device=self.device)
                    grad.index_add_(1, own, gathered[number][part])
                if part == UP:
                    grad.mul_(group.scales)
                elif part in norms:
                    grad.div_(norms[part])
                elif group.cells > 1:
                    down = by_channel(grad, group.cells).transpose(0, 1)
                    group.view(self.grads, DOWN).copy_(down)
        if self._first is not None:
            self._first.collect(self.grads)

    def clip(self, limits: Sequence[float | None]) -> Tensor:
        """Clip every slot's gradient to its own limit; returns the norms before.  # (K,)"""
        norms = torch.linalg.vector_norm(self.grads, dim=1)
        largest = torch.tensor([math.inf if limit is None else limit for limit in limits])
        factors = (largest.to(self.device) / (norms + CLIP_EPS)).clamp(max=1.0)
        self.grads *= factors[:, None]
        return norms


def _unbound(gains: Tensor | None, group: Group) -> Sequence[Tensor | None]:
    """(L, K, dim) as L tensors of (K, 1, dim); L times None if there are no gains."""
    return [None] * len(group.layers) if gains is None else gains.unsqueeze(2).unbind()


def install(
    parent: nn.Module, layers: Mapping[str, Layer], bank: AdapterBank, first: int = 0
) -> None:
    """Put the bank on `parent`, whose layers `layers` are, by module name.

    In the bank they have the numbers from `first` on.
    """
    for index, (name, layer) in enumerate(layers.items(), first):
        kind = BankConv if isinstance(layer, nn.Conv2d) else BankLinear
        _replace(parent, name, kind(layer, bank, index))


def uninstall(parent: nn.Module) -> None:
    """Put back the layers that `install` replaced."""
    for name, module in list(parent.named_modules()):
        if isinstance(module, BankLayer):
            _replace(parent, name, module.base_layer)


def _replace(parent: nn.Module, name: str, module: nn.Module) -> None:
    path, _, child = name.rpartition(".")
    setattr(parent.get_submodule(path), child, module)

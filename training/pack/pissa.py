"""PiSSA in the bank: B and A start at B0 and A0, the largest part of the weight, and train away.

Rows of weights in, rows that the layers compute with out, and the gradients the same way back. The
update is B·A - B0·A0, and the base is not touched. It is computed as (B - B0)·A + B0·(A - A0), of
rank 2r: rounding to half precision is then relative to the change, where B·A and B0·A0 would each
be rounded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.pack.parts import DOWN, UP, Parts
from training.recipe import Network


def stacked(trained: Parts, first: Parts) -> Parts:
    """Factors as a LoRA of twice the rank, the form of PEFT's conversion: A over A0, (B, -B0)."""
    return {
        key: torch.cat([tensor, first[key]], _axis(key)) if key in first else tensor
        for key, tensor in trained.items()
    }


def unstacked(whole: Parts) -> tuple[Parts, Parts]:
    """The inverse of `stacked`: the trained parts, and A0 and -B0."""
    trained, first = dict(whole), {}
    for key, tensor in whole.items():
        if key[1] in (DOWN, UP):
            trained[key], first[key] = tensor.chunk(2, _axis(key))
    return trained, first


def small_factors(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """A over A - A0, and (B - B0, B0): they have the same product as A over A0 and (B, -B0).

    # (2r, in), (out, 2r) -> the same shapes; kernels likewise
    """
    trained_down, first_down = down.chunk(2)
    trained_up, minus_first_up = up.chunk(2, dim=1)
    return (
        torch.cat([trained_down, trained_down - first_down]),
        torch.cat([trained_up + minus_first_up, -minus_first_up], dim=1),
    )


@dataclass(frozen=True)
class _Places:
    """Where one slot's factors have their first and second r ranks in the flattened rows."""

    keys: tuple[tuple[str, str], ...]  # in the order in which the numbers lie
    first: Tensor
    second: Tensor


class FirstFactors:
    """A0 and B0 of the slots that have them, for rows whose ranks from r to 2r are padding."""

    def __init__(
        self,
        networks: Sequence[Network],
        weights: Tensor,
        split: Callable[[int, Tensor, bool], Parts],
    ) -> None:
        """`split(slot, row, True)` gives a row's parts as files have them.  # weights: (K, P)"""
        numbers = torch.arange(weights.numel(), device=weights.device).view_as(weights)
        self._offset = torch.zeros_like(weights)
        self._parts: dict[int, Parts] = {}
        self._places: dict[tuple[int, str], _Places] = {}
        for slot, network in enumerate(networks):
            if network.init != "pissa":
                continue
            first, second = unstacked(split(slot, numbers[slot], True))
            for part in (DOWN, UP):
                keys = tuple(key for key in second if key[1] == part)
                self._places[slot, part] = _Places(
                    keys, _flat([first[key] for key in keys]), _flat([second[key] for key in keys])
                )

    def put(self, slot: int, first: Parts) -> None:
        """Set a slot's A0 and -B0."""
        self._parts[slot] = {key: tensor.to(self._offset) for key, tensor in first.items()}
        offset = self._offset.view(-1)
        for part in (DOWN, UP):
            places = self._places[slot, part]
            values = _flat([self._parts[slot][key] for key in places.keys])
            offset[places.second] = -values
            if part == UP:
                offset[places.first] = values

    def of(self, slot: int) -> Parts:
        """A slot's A0 and -B0; empty for a slot without PiSSA."""
        return self._parts.get(slot, {})

    def acting(self, weights: Tensor) -> Tensor:
        """The rows that the layers compute with.  # (K, P)"""
        rows = weights + self._offset
        for (_, part), places in self._places.items():
            if part == DOWN:
                rows.view(-1)[places.second] += weights.view(-1)[places.first]
        return rows

    def collect(self, grads: Tensor) -> None:
        """Turn gradients of `acting`'s rows into those of the weights, in place."""
        flat = grads.view(-1)
        for (_, part), places in self._places.items():
            if part == DOWN:
                flat[places.first] += flat[places.second]
            flat[places.second] = 0


def _axis(key: tuple[str, str]) -> int:
    return 0 if key[1] == DOWN else 1


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])

"""Rank 0 acts while the other workers go along with every forward pass of a shared base.

A forward pass of a sharded denoiser gathers each block's weights from all workers, so no worker can
sample alone. The others compute on zeros of the same shapes and keep nothing: what rank 0 does
(scoring) need not know of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from training.families import Base
from training.group import Group

T = TypeVar("T")


@dataclass(frozen=True)
class _Shape:
    """The shape of a tensor that the denoiser is given; other ranks do not need its values."""

    size: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Call:
    """A forward pass that all are to compute."""

    args: Any
    kwargs: Any


@dataclass(frozen=True)
class _Result:
    """The value of rank 0's act, with which the other ranks stop following."""

    value: Any


def in_step(group: Group, base: Base, act: Callable[[], T]) -> T:
    """Compute `act()` on rank 0 and give its value to every rank; all call it with the same `base`.

    The adapters on `base` must be the same on all. Raises RuntimeError on rank 0, which has to end
    the worker, when a forward pass broke off there: the others are still in it.
    """
    if group.world_size == 1:
        return act()
    if group.rank != 0:
        result: T = _follow(group, base)
        return result
    under_way = False

    def announce(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal under_way
        under_way = True
        call = _Call(_shapes(args), _shapes(kwargs))
        group.rank_0_says(lambda: call)

    def done(*_: Any) -> None:
        nonlocal under_way
        under_way = False

    # The announcement comes before the hook in which the first weights are gathered.
    before = base.denoiser.register_forward_pre_hook(announce, prepend=True, with_kwargs=True)
    after = base.denoiser.register_forward_hook(done)
    try:
        value = act()
    finally:
        before.remove()
        after.remove()
    if under_way:
        raise RuntimeError(f"a forward pass of the shared base broke off on rank 0 ({value})")
    group.rank_0_says(lambda: _Result(value))
    return value


def _follow(group: Group, base: Base) -> Any:
    while True:
        said = group.rank_0_says(_only_rank_0)
        if isinstance(said, _Result):
            return said.value
        with torch.no_grad():
            base.denoiser(*_zeros(said.args, base.device), **_zeros(said.kwargs, base.device))


def _only_rank_0() -> Any:
    raise RuntimeError("a follower was asked to speak")


def _shapes(value: Any) -> Any:
    """Replace tensors by their shapes, also inside of containers; all else stays as it is."""
    if isinstance(value, Tensor):
        return _Shape(tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: _shapes(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_shapes(item) for item in value)
    return value


def _zeros(value: Any, device: torch.device) -> Any:
    """The inverse of `_shapes`, with zeros."""
    if isinstance(value, _Shape):
        return torch.zeros(value.size, dtype=value.dtype, device=device)
    if isinstance(value, dict):
        return {key: _zeros(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_zeros(item, device) for item in value)
    return value

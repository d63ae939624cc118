"""The slots of a pack that act, and their parts of tensors that hold all slots.

Slots and tensors with a slot axis in, smaller tensors out. Where no other slot lies between them
the result is a view, so that gradients can be added up in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Ascending indices of slots; None means all of them.
Slots = tuple[int, ...] | None


def is_run(slots: Slots) -> bool:
    """Whether there is no gap between the slots."""
    return slots is None or slots[-1] - slots[0] + 1 == len(slots)


def of_slots(tensor: Tensor, slots: Slots) -> Tensor:
    """The part that belongs to the slots; a view if they have no gaps, else a copy.

    # (L, K, ...) -> (L, n, ...)
    """
    if slots is None:
        return tensor
    if is_run(slots):
        return tensor[:, slots[0] : slots[-1] + 1]
    return tensor.index_select(1, torch.tensor(slots, device=tensor.device))


def put_slots(tensor: Tensor, slots: Slots, values: Tensor) -> None:
    """Set the part that belongs to the slots.  # (L, K, ...), (L, n, ...)"""
    if is_run(slots):
        of_slots(tensor, slots).copy_(values)
    else:
        tensor.index_copy_(1, torch.tensor(slots, device=tensor.device), values)

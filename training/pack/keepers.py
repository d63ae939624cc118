"""Which worker keeps which trial's optimiser: the first stage of ZeRO (Rajbhandari et al. 2020).

Every worker has the weights and gradients of all slots; a slot's optimiser state and its average of
the weights are with its keeper alone, who takes the step and gives the others the new weights.
A worker keeps whole slots and never a part of one, so that every optimiser takes the same step as
without sharing: also one that looks at the shape of a tensor, or at all weights of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from training.group import Group
from training.recipe import Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Keeper:
    """The worker that keeps one slot's optimiser, as the worker of `group` sees it."""

    rank: int
    size: float  # how many numbers are kept for each number of an adapter
    group: Group

    @property
    def is_here(self) -> bool:
        return self.rank == self.group.rank

    def spread(self, tensor: Tensor) -> None:
        """Give the keeper's numbers in `tensor` to all; to be called by all workers together."""
        dist.broadcast(tensor, src=self.rank)

    def to_rank_0(self, make: Callable[[], T]) -> T | None:
        """What the keeper makes, on rank 0; None on the others. All must call it together."""
        return self.group.to_rank_0(self.rank, make)


def keepers_for(
    recipes: Sequence[Recipe], group: Group, taken: Sequence[Keeper] = ()
) -> list[Keeper]:
    """Choose a keeper for each recipe, the one that keeps the least; the same on all workers.

    `taken` are the keepers of other slots. Among equals the last one is chosen, since rank 0 has
    more to do.
    """
    loads = [0.0] * group.world_size
    counts = [0] * group.world_size
    chosen = []

    def load(keeper: Keeper) -> None:
        loads[keeper.rank] += keeper.size
        counts[keeper.rank] += 1

    for keeper in taken:
        load(keeper)
    for recipe in recipes:
        size = recipe.optimizer.state_size + (recipe.ema_decay is not None)
        rank = min(range(group.world_size), key=lambda rank: (loads[rank], counts[rank], -rank))
        chosen.append(Keeper(rank, size, group))
        load(chosen[-1])
    return chosen

"""The workers of one group: how rank 0's word reaches the others, and who died where.

Small coordination for `training.run.worker`; nothing here knows models or recipes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from captioning import write_atomic

# The other workers wait at most this long while rank 0 encodes or scores. If rank 0 dies, Ray
# notices it; this limit is not for that.
LONGEST_WAIT = timedelta(days=1)

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """The workers that train a pack together, and this worker's place among them."""

    rank: int = 0
    world_size: int = 1
    #: The number of workers that a recipe's `batch_size` is written for; None: `world_size`.
    batch_workers: int | None = None
    #: The group whose workers keep the optimisers of a part of the trials each, which gives the
    #: same numbers (see `pack.keepers`); None: every worker keeps all optimisers.
    optimizers_shared_in: Group | None = None


ALONE = Workers()


class Group:
    """This worker's place among the workers, and what they say to each other."""

    def __init__(self, rank: int, world_size: int) -> None:
        """With more than one worker the default process group must be there already."""
        self.rank = rank
        self.world_size = world_size
        # These waits are long, while a lost gradient must show soon: so they have a process group
        # of their own.
        self._waiting_room = (
            dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if world_size > 1 else None
        )

    def rank_0_says(self, say: Callable[[], T]) -> T:
        """Compute `say()` on rank 0 and give its value to every rank; the others wait for it."""
        if self.world_size == 1:
            return say()
        box: list[Any] = [say() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=self._waiting_room)
        return box[0]

    def all_say(self, word: T) -> list[T]:
        """Give the `word` of every rank to every rank, in the order of the ranks."""
        if self.world_size == 1:
            return [word]
        said: list[Any] = [None] * self.world_size
        dist.all_gather_object(said, word, group=self._waiting_room)
        return said

    def to_rank_0(self, source: int, make: Callable[[], T]) -> T | None:
        """Compute `make()` on rank `source` and give its value to rank 0; None on the others."""
        if self.rank == source:
            made = make()
            if source == 0:
                return made
            dist.send_object_list([made], dst=0, group=self._waiting_room)
        elif self.rank == 0:
            box: list[Any] = [None]
            dist.recv_object_list(box, src=source, group=self._waiting_room)
            received: T = box[0]
            return received
        return None

    def wait_for_all(self) -> None:
        """Return once every rank is here."""
        if self.world_size > 1:
            dist.barrier(group=self._waiting_room)


class Ledger:
    """Counts, across restarts of the worker group, in which phase a worker died.

    A trial whose recipe kills its worker (too little memory, most often) would otherwise take all
    the others with it. Rank 0 keeps it; the file belongs to one run of the group.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._deaths: dict[str, int] = {}
        if path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            self._deaths = saved["deaths"]
            self._deaths[saved["phase"]] = self.deaths(saved["phase"]) + 1

    def enter(self, phase: str) -> None:
        """Count a death from here on for `phase`: the setup, or the ids of a pack's trials."""
        content = {"phase": phase, "deaths": self._deaths}
        write_atomic(self._path, json.dumps(content).encode())

    def deaths(self, phase: str) -> int:
        return self._deaths.get(phase, 0)

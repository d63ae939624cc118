"""Which trials are trained together: recipes in, packs out. Pure.

The same recipes in the same order always give the same packs, so that a sweep that goes on
puts its trials together as before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from training.pack.pack import shared_by_a_pack
from training.recipe import Recipe

# The most adapters in a pack, if nobody says. From 8 on a small model's step grows with the batch
# (a tiny SDXL-shaped UNet: 5.5 times the adapters per second at 8, which is what one adapter gains
# from a batch of 8).
TRIALS_PER_PACK = 8
# Samples in one forward pass, since activations and not adapters take the memory: a UNet of SDXL's
# size keeps about 1.5 GB per sample at 512 px for the backward pass (counted, half precision,
# nothing recomputed), so 32 are about 48 GB. A pack that does not fit is trained in halves.
MAX_SAMPLES = 32


def plan_packs(
    recipes: Sequence[Recipe], trials_per_pack: int = TRIALS_PER_PACK
) -> list[list[int]]:
    """The indices of the recipes of every pack, each recipe in one, first come first served.

    Recipes that can share a pack are spread evenly over as few packs as the limits allow.
    """
    if trials_per_pack < 1:
        raise ValueError(f"trials_per_pack is {trials_per_pack}; a pack has at least one slot")
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, recipe in enumerate(recipes):
        alike.setdefault(shared_by_a_pack(recipe), []).append(index)
    packs = []
    for indices in alike.values():
        fitting = MAX_SAMPLES // recipes[indices[0]].samples_per_pass
        count = math.ceil(len(indices) / max(1, min(trials_per_pack, fitting)))
        packs += _spread(indices, count)
    return packs


def _spread(indices: list[int], count: int) -> list[list[int]]:
    """`indices` in `count` runs whose lengths differ by one at most."""
    bounds = [len(indices) * part // count for part in range(count + 1)]
    return [indices[start:stop] for start, stop in itertools.pairwise(bounds)]

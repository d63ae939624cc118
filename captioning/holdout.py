"""Which images a dataset version holds out: a share of each framing, the same ones every time.

Pure. The held-out images are the references that identity is scored against, so they have to show
the character as the training images do: close-ups, upper body and whole figure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from captioning.framing import FRAMINGS, Framing

# With fewer pictures nothing can be spared for a holdout.
MIN_PICTURES_FOR_HOLDOUT = 5
MAX_HOLDOUT_SHARE = 0.5
# The order in which equal claims are served; None is an image whose framing is not observable.
_ORDER: tuple[Framing | None, ...] = (*FRAMINGS, None)


def draw_holdout(framings: Mapping[str, Framing | None], share: float, seed: int) -> frozenset[str]:
    """The sha256s held out of `framings` (framing by sha256), a share of 0 to 0.5 of all.

    Every framing with two or more images has one held out, when there are places enough; the
    other places go by size. Within a framing those with the lowest hashes are taken, so that
    adding pictures moves few between the splits. Empty with fewer than 5 images.
    """
    if len(framings) < MIN_PICTURES_FOR_HOLDOUT or share == 0:
        return frozenset()
    groups = {
        framing: sorted(
            (sha256 for sha256, own in framings.items() if own == framing),
            key=lambda sha256: hashlib.sha256(f"{seed}:{sha256}".encode()).digest(),
        )
        for framing in _ORDER
    }
    places = max(1, round(share * len(framings)))
    taken = _share_out(places, {framing: len(group) for framing, group in groups.items()})
    return frozenset(
        sha256 for framing, group in groups.items() for sha256 in group[: taken[framing]]
    )


def _share_out(places: int, sizes: Mapping[Framing | None, int]) -> dict[Framing | None, int]:
    """Places for each group: one each as far as they go, then by Sainte-Laguë's divisors.

    Divisors never take a place back when there is one more to give, which keeps the split stable.
    A group keeps its last image for training as long as another group has one to spare.
    """
    taken = dict.fromkeys(sizes, 0)
    for _ in range(places):
        open_groups = [group for group in sizes if taken[group] < sizes[group]]
        best = max(
            open_groups,
            key=lambda group: (
                sizes[group] - taken[group] > 1,
                taken[group] == 0,
                sizes[group] / (2 * taken[group] + 1),
                -_ORDER.index(group),
            ),
        )
        taken[best] += 1
    return taken

"""Estimates in words, for `lorafarm estimate` and for a sweep that begins.

Estimates in, text out; nothing is measured here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from services.farm.durations import duration
from services.sweeps.estimates import PackEstimate
from services.sweeps.plan import PlannedTrial

GB = 1e9


def titles(trials: Sequence[PlannedTrial]) -> str:
    """`2 × lora r4, dora r4`: what the trials of a pack are."""
    networks = [planned.recipe.network for planned in trials]
    counts = Counter(network.title for network in networks)
    return ", ".join(
        title if count == 1 else f"{count} × {title}" for title, count in counts.items()
    )


def gigabytes(count: int) -> str:
    return f"{count / GB:.2f} GB"


def known_line(
    estimates: Sequence[PackEstimate],
    checkpoints: int,
    scoring_s: float | None,
    memory_bytes: int | None,
) -> str | None:
    """What the sweep will take, or who measures that; None if all is done."""
    seconds = [estimate.seconds for estimate in estimates if estimate.seconds is not None]
    if not any(estimate.steps for estimate in estimates):
        return None
    if len(seconds) < len(estimates):
        unknown = f"{len(estimates) - len(seconds)} of {len(estimates)} packs"
        return (
            "time and memory were never measured here for "
            f"{unknown if seconds else 'this sweep'}: `lorafarm estimate` does, in a few steps"
        )
    peak = max(estimate.measured.peak_bytes for estimate in estimates if estimate.measured)
    training = duration(sum(seconds), estimated=True)
    packs = "1 pack" if len(estimates) == 1 else f"{len(estimates)} packs one after the other"
    line = (
        f"estimated: {training} of training ({packs}, {gigabytes(peak)} of memory), "
        f"{scoring_text(checkpoints, scoring_s)}"
    )
    if memory_bytes is not None and peak > memory_bytes:
        line += f"; only {gigabytes(memory_bytes)} of memory are there: see `lorafarm estimate`"
    return line


def scoring_text(checkpoints: int, scoring_s: float | None) -> str:
    """How long the checkpoints take that are still to be scored."""
    if scoring_s is None:
        return f"scoring {checkpoints} checkpoints not included: no sweep has measured it yet"
    scoring = duration(checkpoints * scoring_s, estimated=True)
    return f"{scoring} of scoring ({checkpoints} checkpoints)"

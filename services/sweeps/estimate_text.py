"""Estimates in words: a table for `lorafarm estimate`, and a line for a sweep that begins.

Estimates in, text out. Never measures anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from services.farm.durations import duration
from services.sweeps.estimates import PackEstimate
from services.sweeps.plan import PlannedTrial
from training import views_per_image

GB = 1e9


def pack_table(estimates: Sequence[PackEstimate], pictures: int, workers: int) -> Table:
    """One row per pack."""
    table = Table("pack", "steps left", "views of each picture", "s per step", "training", "memory")
    for estimate in estimates:
        measured, seconds = estimate.measured, estimate.seconds
        table.add_row(
            titles(estimate.trials),
            str(estimate.steps),
            _views(estimate.trials, pictures, workers),
            f"{measured.step_s:.2g}" if measured else "",
            duration(seconds, estimated=True) if seconds is not None else "",
            gigabytes(measured.peak_bytes) if measured else "does not fit",
        )
    return table


def titles(trials: Sequence[PlannedTrial]) -> str:
    """`2 × lora r4, dora r4`: what the trials of a pack are."""
    networks = [planned.recipe.network for planned in trials]
    counts = Counter(network.title for network in networks)
    return ", ".join(
        title if count == 1 else f"{count} × {title}" for title, count in counts.items()
    )


def _views(trials: Sequence[PlannedTrial], pictures: int, workers: int) -> str:
    views = sorted(views_per_image(t.recipe.steps, t.recipe, pictures, workers) for t in trials)
    few, many = f"{views[0]:.0f}", f"{views[-1]:.0f}"
    return few if few == many else f"{few} to {many}"


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
    """Of the checkpoints that are still to be scored."""
    if scoring_s is None:
        return f"scoring {checkpoints} checkpoints not included: no sweep has measured it yet"
    scoring = duration(checkpoints * scoring_s, estimated=True)
    return f"{scoring} of scoring ({checkpoints} checkpoints)"

"""Shows what a sweep would take: a row per pack, and the change that makes a pack fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from services.cli.progress import Display
from services.datasets.versions import newest_dataset
from services.farm.durations import duration
from services.farm.settings import Home
from services.sweeps.estimate_text import gigabytes, scoring_text, titles
from services.sweeps.measuring import MeasuredSweep, TooLarge, measure_sweep
from services.sweeps.plan import PlannedTrial, load_sweep
from training import views_per_image


def estimate_command(
    home: Home,
    character: str,
    config: Path | None,
    memory_gib: float | None,
    again: bool,
    console: Console,
) -> bool:
    """`lorafarm estimate`: print the estimate of every pack; False if one of them does not fit."""
    parsed, source = load_sweep(config)
    with Display(console) as display:
        dataset = newest_dataset(home, character, display)
        measured = measure_sweep(
            home, dataset, parsed, source, memory_gib=memory_gib, again=again, progress=display
        )
    print_estimate(measured, console)
    return measured.fits


def print_estimate(measured: MeasuredSweep, console: Console) -> None:
    """A table of the packs, the whole time, what is left out, and the advice."""
    console.print(_pack_table(measured))
    known = [pack.seconds for pack in measured.packs if pack.seconds is not None]
    if len(known) == len(measured.packs):
        scoring = scoring_text(measured.checkpoints, measured.scoring_s)
        console.print(f"training: {duration(sum(known), estimated=True)}; {scoring}")
    for sentence in measured.not_counted:
        console.print(sentence)
    for too_large in measured.too_large:
        _print_advice(too_large, measured.limit_bytes, console)


def _pack_table(measured: MeasuredSweep) -> Table:
    table = Table("pack", "steps left", "views of each picture", "s per step", "training", "memory")
    for pack in measured.packs:
        found, seconds = pack.measured, pack.seconds
        table.add_row(
            titles(pack.trials),
            str(pack.steps),
            _views(pack.trials, measured.pictures, measured.workers),
            f"{found.step_s:.2g}" if found else "",
            duration(seconds, estimated=True) if seconds is not None else "",
            gigabytes(found.peak_bytes) if found else "does not fit",
        )
    return table


def _views(trials: Sequence[PlannedTrial], pictures: int, workers: int) -> str:
    views = sorted(views_per_image(t.recipe.steps, t.recipe, pictures, workers) for t in trials)
    few, many = f"{views[0]:.0f}", f"{views[-1]:.0f}"
    return few if few == many else f"{few} to {many}"


def _print_advice(too_large: TooLarge, limit_bytes: int, console: Console) -> None:
    """Say by what change the pack would fit."""
    pack, change = too_large.pack, too_large.change
    needs = gigabytes(pack.measured.peak_bytes) if pack.measured else "more"
    console.print(
        f"[red]{titles(pack.trials)}: does not fit:[/] it needs {needs}, and "
        f"{gigabytes(limit_bytes)} are there"
    )
    if change is None:
        console.print(
            "  no smaller batch or rank fits, with gradient checkpointing either: lower "
            "`resolution`, or set a smaller `trials_per_pack` in settings.yaml"
        )
        return
    console.print(
        f"  it fits with {change.text}\n"
        f"  ({gigabytes(change.measured.peak_bytes)}, {change.measured.step_s:.2g} s per step)"
    )

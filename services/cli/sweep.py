"""Runs a sweep from the terminal: the plan first, bars and sentences, the leaderboard at last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from services.cli.leaderboard import print_leaderboard
from services.cli.progress import Display
from services.cli.watching import Watcher
from services.coordinator.run import FinishedSweep, run_sweep
from services.datasets.versions import newest_dataset
from services.farm.engine import ray_when_needed
from services.farm.settings import Home
from services.sweeps.estimate_text import known_line
from services.sweeps.plan import load_sweep
from services.sweeps.prepare import PreparedSweep, prepare_sweep


def sweep_command(home: Home, character: str, config: Path | None, console: Console) -> None:
    """`lorafarm sweep`: the newest dataset version of `character`, then the leaderboard."""
    parsed, source = load_sweep(config)
    with Display(console) as display:
        dataset = newest_dataset(home, character, display)
    prepared = prepare_sweep(home, dataset, parsed, source)
    print_prepared(prepared, console)
    with ray_when_needed(home) as start_ray:
        finished = watched_sweep(home, prepared, start_ray, console)
    print_leaderboard(finished.winner, console)
    registered = finished.registered
    console.print(f"registered as [bold]{registered.reference}[/] @candidate")
    console.print(f"next: lorafarm promote {registered.name} {registered.version} --to production")


def print_prepared(prepared: PreparedSweep, console: Console) -> None:
    """What the person should know before the sweep begins."""
    for warning in prepared.warnings:
        console.print(f"[yellow]note:[/] {escape(warning)}")
    views = (
        f"{one.steps} steps = {one.views:.0f} views of each of {one.pictures} pictures"
        for one in prepared.views
    )
    console.print(f"  {'; '.join(views)}")
    estimate = prepared.estimate
    known = known_line(
        estimate.packs, estimate.checkpoints, estimate.scoring_s, estimate.memory_bytes
    )
    if known:
        console.print(f"  {known}")


def watched_sweep(
    home: Home, prepared: PreparedSweep, start_ray: Callable[[], None], console: Console
) -> FinishedSweep:
    """Run the sweep with bars, and a line for what happens."""
    with Display(console) as display:
        watcher = Watcher(prepared.plan, display)
        return run_sweep(home, prepared, start_ray, display, watcher)

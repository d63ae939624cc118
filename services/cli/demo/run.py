"""`lorafarm demo`: the main job, start to finish, on the example characters.

Every part is what the commands for a person's own characters use; only the pictures, the names
and the sweep are given. Run again with the same folder, it goes on from what is done.
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console

from captioning import load_config, write_atomic
from services.cli.dataset_intake import print_added, print_captioned, print_frozen
from services.cli.leaderboard import print_leaderboard
from services.cli.progress import Display
from services.cli.sweep import print_prepared, watched_sweep
from services.coordinator.run import FinishedSweep
from services.datasets.steps import add_pictures, caption_pictures, freeze_dataset
from services.farm.durations import duration
from services.farm.engine import ray_when_needed
from services.farm.settings import Home, open_home
from services.registry.releases import promote
from services.report.pictures import character_sheet
from services.report.sweep_report import character_report, write_report
from services.sweeps.plan import SweepConfig
from services.sweeps.prepare import prepare_sweep

# Name and trigger of the example characters; a folder of pictures bears each name.
CHARACTERS = {"aya": "ayachar", "bruno": "brunochar"}
CLASS_WORD = "person"
HOLDOUT = 0.25
REPORT_FILE = "report.html"


def run_demo(out: Path, console: Console) -> None:
    """Do the whole job below `out` and print where everything is."""
    started = time.monotonic()
    out = out.resolve()
    home = open_home(out / "home")
    out.mkdir(parents=True, exist_ok=True)
    with as_file(files("services.cli.demo")) as package:
        for name, trigger in CHARACTERS.items():
            pictures = package / "pictures" / name
            with Display(console) as display:
                added = add_pictures(home, name, pictures, trigger, CLASS_WORD, "keep", display)
            print_added(added, console)
        config = load_config(SweepConfig, package / "sweep.yaml")
        with ray_when_needed(home) as start_ray:
            start_ray()
            with Display(console) as display:
                captioned = caption_pictures(home, list(CHARACTERS), display)
            print_captioned(captioned, console)
            finished = [_sweep(home, name, config, console, start_ray) for name in CHARACTERS]
        for sweep in finished:
            _promote_and_show(home, sweep, console)
        report = write_report(home, list(CHARACTERS), out / REPORT_FILE, time.monotonic() - started)
    for name in CHARACTERS:
        sheet = _write_sheet(home, name, out)
        console.print(f"contact sheet: {sheet}", soft_wrap=True)
    console.print(f"[bold]report:[/] {report}", soft_wrap=True)
    # Within reach only of those who have activated the environment.
    program = "lorafarm" if shutil.which("lorafarm") else sys.argv[0]
    console.print(f"look around: LORAFARM_HOME={home.path} {program} status", soft_wrap=True)
    console.print(f"total time: {duration(time.monotonic() - started)}")


def _sweep(
    home: Home, name: str, config: SweepConfig, console: Console, start_ray: Callable[[], None]
) -> FinishedSweep:
    with Display(console) as display:
        frozen = freeze_dataset(home, name, HOLDOUT, display)
    print_frozen(frozen, console)
    prepared = prepare_sweep(home, frozen.dataset, config, "sweep.yaml")
    print_prepared(prepared, console)
    return watched_sweep(home, prepared, start_ray, console)


def _promote_and_show(home: Home, sweep: FinishedSweep, console: Console) -> None:
    """Move `production` to the winner and print the result."""
    promote(home, sweep.registered.name, sweep.registered.version)
    console.print(f"\n[bold]{sweep.asked.character}[/]")
    print_leaderboard(sweep.winner, console)
    console.print(f"registered: {sweep.registered.reference} @candidate @production")
    for report in sweep.registered.exports:
        console.print(
            f"exported ({report.format}): {report.path}  largest error after reload "
            f"{report.max_error:.1e}",
            soft_wrap=True,
        )


def _write_sheet(home: Home, name: str, out: Path) -> Path:
    """The character's contact sheet as a picture of its own, to show around."""
    picture = io.BytesIO()
    character_sheet(character_report(home, name)).save(picture, "PNG")
    file = out / f"contact-sheet-{name}.png"
    write_atomic(file, picture.getvalue())
    return file

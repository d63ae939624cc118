"""The commands for the farm as a whole: `demo`, `status`, `doctor`, `mlflow`.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from captioning import UserError
from services.cli.exit_codes import EXIT_BROKEN
from services.cli.options import HomeOption, console
from services.farm.settings import open_home


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Everything the demo makes goes into this folder.")
    ] = Path("demo-out"),
) -> None:
    """Run the main job on two example characters, start to finish.

    Pictures → tags and captions → dataset version → a sweep of rank {4, 16} × {LoRA, DoRA} →
    scored checkpoints → the winner registered, exported, verified → an HTML report. Stop it at
    any moment; the same command goes on from what is done.
    """
    from services.cli.demo import run_demo

    run_demo(out, console)


def status(home: HomeOption = None) -> None:
    """What the farm holds: characters, dataset versions, sweeps, registered adapters."""
    from services.cli.status import print_status
    from services.report.farm_status import farm_status

    print_status(farm_status(open_home(home)), console)


def doctor(home: HomeOption = None) -> None:
    """What is there, what is missing, and the command that fixes it."""
    from services.cli.doctor import print_checks
    from services.farm.doctor import check_machine, missing_parts

    checks = check_machine(open_home(home))
    print_checks(checks, console)
    if missing_parts(checks):
        raise typer.Exit(EXIT_BROKEN)


def mlflow(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
    home: HomeOption = None,
) -> None:
    """Open MLflow's pages on the farm's runs and registry at 127.0.0.1 (Ctrl-C ends it)."""
    from services.registry.mlflow_pages import HOST, running_pages

    with running_pages(open_home(home), port) as server:
        console.print(f"MLflow at http://{HOST}:{port} (Ctrl-C ends it)")
        code = server.wait()
    if code:
        raise UserError("lorafarm mlflow", f"MLflow ended with code {code}", "see its lines above")

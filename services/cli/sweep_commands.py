"""The commands around a sweep: `sweep`, `estimate`, `recipe`, `leaderboard`.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.cli.exit_codes import EXIT_USER
from services.cli.options import CharacterArgument, HomeOption, console
from services.farm.settings import open_home


def sweep(
    character: CharacterArgument,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="YAML with base, recipe, search and scoring; `lorafarm recipe` prints one.",
        ),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Train every recipe of a search space on the newest dataset version and score each checkpoint.

    Prints the leaderboard and registers the winner as `<character>.<family>@candidate`.
    """
    from services.cli.sweep import sweep_command

    sweep_command(open_home(home), character, config, console)


def estimate(
    character: CharacterArgument,
    config: Annotated[
        Path | None, typer.Option("--config", help="The sweep's YAML, as for `lorafarm sweep`.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            min=0.001,
            help="GiB that a worker may take, in place of what is free here.",
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again", help="Measure packs anew; the machine was busy the last time, say."
        ),
    ] = False,
    home: HomeOption = None,
) -> None:
    """What a sweep would take: time and memory of every pack, from a few measured steps.

    Trains nothing for good. What was measured is kept, and shown before every such sweep. Says by
    what change a pack would fit that does not; the exit code is then 2.
    """
    from services.cli.estimate import estimate_command

    if not estimate_command(open_home(home), character, config, memory, again, console):
        raise typer.Exit(EXIT_USER)


def recipe() -> None:
    """Print a commented sweep file with every field at its default, to start from."""
    from services.sweeps.recipe_text import commented_sweep

    typer.echo(commented_sweep())


def leaderboard(
    character: CharacterArgument,
    report: Annotated[
        Path | None, typer.Option("--report", help="Also write the HTML report to this file.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Every scored checkpoint of the newest scored sweep, best first, with 95 % intervals."""
    from services.cli.leaderboard import leaderboard_command

    leaderboard_command(open_home(home), character, report, console)

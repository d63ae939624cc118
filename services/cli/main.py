"""The `lorafarm` command: reads arguments, calls the rooms, prints what happened.

Exit codes: 0 done, 1 something broke, 2 the person can fix it (the message says how), 130 stopped
by Ctrl-C. Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from captioning import UserError
from services.cli.dataset_commands import dataset_app
from services.cli.options import CharacterArgument, HomeOption, console
from services.farm.settings import open_home

EXIT_BROKEN = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130
# A path that somebody gave leads nowhere: a file where a folder is meant, or none may write.
PATH_ERRORS = (
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
)

app = typer.Typer(
    name="lorafarm",
    help="Folders of character pictures in, scored and registered LoRA/DoRA adapters out.",
    epilog="Start with `lorafarm demo`: the whole job on two example characters, in one command.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(dataset_app, name="dataset")

errors = Console(stderr=True, highlight=False)


@app.command()
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


@app.command()
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
    from services.coordinator.run import sweep_command

    sweep_command(open_home(home), character, config, console)


@app.command()
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


@app.command()
def recipe() -> None:
    """Print a commented sweep file with every field at its default, to start from."""
    from services.sweeps.recipe_text import commented_sweep

    typer.echo(commented_sweep())


@app.command()
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


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="Registered adapter, such as `aya.sd15`.")],
    version: Annotated[int, typer.Argument(min=1, help="Its version number.")],
    to: Annotated[
        str, typer.Option("--to", help="Alias to move: `candidate` or `production`.")
    ] = "production",
    home: HomeOption = None,
) -> None:
    """Point an alias at a version; the old production becomes `previous`."""
    from services.registry.winner import promote_command

    promote_command(open_home(home), name, version, to, console)


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="`aya.sd15@production` or `aya.sd15/3`.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write into.")],
    format: Annotated[
        str,
        typer.Option("--format", help="`kohya` (ComfyUI, A1111, Forge, InvokeAI) or `diffusers`."),
    ] = "kohya",
    home: HomeOption = None,
) -> None:
    """Write a registered adapter as a file that generation tools load, checked by its sha256."""
    from services.registry.winner import export_command

    export_command(open_home(home), adapter, to, format, console)


@app.command()
def status(home: HomeOption = None) -> None:
    """What the farm holds: characters, dataset versions, sweeps, registered adapters."""
    from services.cli.status import print_status

    print_status(open_home(home), console)


@app.command()
def doctor(home: HomeOption = None) -> None:
    """What is there, what is missing, and the command that fixes it."""
    from services.farm.doctor import run_doctor

    if not run_doctor(open_home(home), console):
        raise typer.Exit(EXIT_BROKEN)


@app.command()
def mlflow(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
    home: HomeOption = None,
) -> None:
    """Open MLflow's pages on the farm's runs and registry at 127.0.0.1 (Ctrl-C ends it)."""
    from services.registry.mlflow_pages import serve_pages

    serve_pages(open_home(home), port, console)


def main() -> None:
    """The console script: runs `app` and turns what went wrong into one clear message."""
    signal.signal(signal.SIGTERM, _terminate)
    # Its notes (no torchvision, say) are about choices that were made here on purpose.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:
            errors.print("stopped; the same command goes on from what is done")
        raise
    except OSError as error:
        path = error.filename2 or error.filename  # of a renaming, what it was to become
        if error.errno in PATH_ERRORS and path:
            _fail(f"{path}: {error.strerror}. Fix: name another path")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(
            f"{error.filename or 'LORAFARM_HOME'}: the disk is full; nothing half-written was "
            "left. Fix: free some space or set LORAFARM_HOME to another disk, then run the same "
            "command"
        )


def _fail(message: str) -> None:
    errors.print(f"[red]error:[/] {escape(message)}", soft_wrap=True)
    sys.exit(EXIT_USER)


def _terminate(_signal: int, _frame: object) -> None:
    """SIGTERM unwinds like Ctrl-C, so that Ray and its workers end with us."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise KeyboardInterrupt

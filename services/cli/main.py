"""The `lorafarm` command: its groups of commands put together, and its errors shown.

Each group has a file of its own. Exit codes stand in `services.cli.exit_codes`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys

import typer
from rich.console import Console
from rich.markup import escape

from captioning import UserError
from services.cli import adapter_commands, farm_commands, sweep_commands
from services.cli.dataset_commands import dataset_app
from services.cli.exit_codes import EXIT_INTERRUPTED, EXIT_USER

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

# In the order in which `--help` lists them.
for command in (
    farm_commands.demo,
    sweep_commands.sweep,
    sweep_commands.estimate,
    sweep_commands.recipe,
    sweep_commands.leaderboard,
    adapter_commands.promote,
    adapter_commands.export,
    farm_commands.status,
    farm_commands.doctor,
    farm_commands.mlflow,
):
    app.command()(command)


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
        path = error.filename2 or error.filename  # in a renaming, the new name
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

"""What the commands share: the options that mean the same everywhere, and where they print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.farm.settings import HOME_VARIABLE

console = Console(highlight=False)

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        envvar=HOME_VARIABLE,
        help="The farm's folder: all state is kept there. Default: ~/.lorafarm",
        show_default=False,
    ),
]
CharacterArgument = Annotated[str, typer.Argument(help="The character's name, such as `aya`.")]

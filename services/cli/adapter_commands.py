"""The commands for registered adapters: `promote` and `export`.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.cli.options import HomeOption, console
from services.farm.settings import open_home


def promote(
    name: Annotated[str, typer.Argument(help="Registered adapter, such as `aya.sd15`.")],
    version: Annotated[int, typer.Argument(min=1, help="Its version number.")],
    to: Annotated[
        str, typer.Option("--to", help="Alias to move: `candidate` or `production`.")
    ] = "production",
    home: HomeOption = None,
) -> None:
    """Point an alias at a version; the old production becomes `previous`."""
    from services.registry.releases import promote as promote_version

    promotion = promote_version(open_home(home), name, version, to)
    console.print(
        f"[green]✓[/] {promotion.name}@{promotion.alias} is version {promotion.version} now"
    )
    if not promotion.has_lock:
        console.print(
            "[yellow]note:[/] this registry is a tracking server's, which has no lock: let one "
            "person promote at a time"
        )


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
    from services.registry.releases import hand_out

    handed_out = hand_out(open_home(home), adapter, to, format)
    for file, sha256 in handed_out.files:
        console.print(f"[green]✓[/] {file}  sha256 {sha256}", soft_wrap=True)
    console.print(f"trigger: {handed_out.trigger}")

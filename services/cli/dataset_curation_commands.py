"""The commands that mend a dataset before it is frozen: captions, findings, pictures left out.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from services.cli.exit_codes import EXIT_USER
from services.cli.options import CharacterArgument, HomeOption, console
from services.farm.settings import open_home

PictureArgument = Annotated[
    str, typer.Argument(help="Its name as `dataset show` lists it, or the sha256's first digits.")
]


def lint(
    character: CharacterArgument,
    fix: Annotated[
        bool, typer.Option("--fix", help="Record the mechanical fixes as edits first.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, for programs.")
    ] = False,
    home: HomeOption = None,
) -> None:
    """What is wrong with the captions, worst first; exit code 2 when something blocks freezing."""
    from services.cli.dataset_lint import print_lint, print_lint_rows
    from services.datasets.lint import lint_dataset

    result = lint_dataset(open_home(home), character, fix)
    if as_json:
        print_lint_rows(result)
    else:
        print_lint(result, character, fix, console)
    if result.blocks:
        raise typer.Exit(EXIT_USER)


def check(
    character: CharacterArgument,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with all pictures to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    apply: Annotated[
        bool, typer.Option("--apply", help="Drop what is proposed: copies, and what blocks.")
    ] = False,
    home: HomeOption = None,
) -> None:
    """What is wrong with pictures and captions, and which views are missing; no model is called.

    Exit code 2 when something blocks freezing. Nothing is deleted: see `dataset keep`.
    """
    from services.cli.dataset_check import check_command

    if check_command(open_home(home), character, html, as_json, apply, console).blocks:
        raise typer.Exit(EXIT_USER)


def review(
    character: CharacterArgument,
    export: Annotated[
        Path | None, typer.Option("--export", help="Write the captions to read to this CSV.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--import", help="Take states and corrections from that CSV.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare/--no-compare",
            help="Put captions that fit their picture least, by the embedder, further up.",
        ),
    ] = True,
    home: HomeOption = None,
) -> None:
    """Which captions to read first, and how many bad ones may still be left.

    Exit code 2 when rows of the imported table changed meanwhile; nothing of those is taken.
    """
    from services.cli.dataset_review import review_command

    if not review_command(open_home(home), character, export, table, compare, console):
        raise typer.Exit(EXIT_USER)


def edit(
    character: CharacterArgument,
    picture: PictureArgument,
    add: Annotated[list[str] | None, typer.Option("--add", help="A tag to add.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="A tag to remove.")] = None,
    leave: Annotated[
        list[str] | None, typer.Option("--leave", help="A tag to leave to the model again.")
    ] = None,
    prose: Annotated[
        str | None, typer.Option("--prose", help="In place of the model's; empty takes it back.")
    ] = None,
    caption: Annotated[
        str | None,
        typer.Option("--caption", help="All that follows the trigger; empty takes it back."),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Correct one picture's caption; captioning again keeps it. Tags can be given several times."""
    from services.cli.dataset_captions import print_change
    from services.datasets.captions import edit_caption

    changes = [("add", tag) for tag in add or []]
    changes += [("remove", tag) for tag in remove or []]
    changes += [("leave", tag) for tag in leave or []]
    changes += [("prose", prose)] if prose is not None else []
    changes += [("caption", caption)] if caption is not None else []
    print_change(edit_caption(open_home(home), character, picture, changes), console)


def override(
    character: CharacterArgument,
    code: Annotated[str, typer.Argument(help="The finding's code, such as CAP113.")],
    picture: Annotated[
        str | None, typer.Option("--picture", help="For this picture only; else for all.")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Kept with the override.")] = "",
    home: HomeOption = None,
) -> None:
    """Accept a finding that blocks; every version from now on says who did, and why."""
    from services.datasets.decisions import override_finding

    override_finding(open_home(home), character, code, picture, reason)
    whole = f"all pictures of {character}"
    console.print(f"[green]✓[/] {code} is accepted for {escape(picture or whole)}")


def drop(
    character: CharacterArgument,
    picture: PictureArgument,
    reason: Annotated[str, typer.Option("--reason", help="Kept with the decision.")] = "",
    home: HomeOption = None,
) -> None:
    """Leave a picture out of captioning and of every version from now on; nothing is deleted."""
    _decide(home, character, picture, False, reason)


def keep(
    character: CharacterArgument,
    picture: PictureArgument,
    reason: Annotated[str, typer.Option("--reason", help="Kept with the decision.")] = "",
    home: HomeOption = None,
) -> None:
    """Take a dropped picture back in."""
    _decide(home, character, picture, True, reason)


def _decide(home: Path | None, character: str, picture: str, keep: bool, reason: str) -> None:
    from services.datasets.decisions import decide_picture

    done = decide_picture(open_home(home), character, picture, keep, reason)
    state = "kept" if done.keep else "dropped"
    console.print(f"[green]✓[/] {escape(done.image.source)} is {state}; {done.kept} pictures in")


def use_captions(character: CharacterArgument, home: HomeOption = None) -> None:
    """Use the captions that came with the pictures instead of rendered ones.

    They become edits: captioning again keeps them, and your own edit of a caption wins.
    """
    from services.cli.dataset_captions import print_used_captions
    from services.datasets import captions

    print_used_captions(captions.use_captions(open_home(home), character), character, console)

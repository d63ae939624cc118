"""The `lorafarm dataset` commands: reads arguments, calls the room, nothing else.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from services.cli_options import CharacterArgument, HomeOption, console
from services.settings import open_home

dataset_app = typer.Typer(
    help="From a folder of pictures to an immutable, captioned dataset version.",
    no_args_is_help=True,
)


@dataset_app.command("add")
def dataset_add(
    character: CharacterArgument,
    pictures: Annotated[
        list[Path], typer.Argument(help="Folders, ZIP files or pictures, one or several.")
    ],
    trigger: Annotated[
        str,
        typer.Option(
            "--trigger", help="Activation token: one rare word that will stand for the character."
        ),
    ],
    class_word: Annotated[
        str, typer.Option("--class-word", help="What the character is, in the base's words.")
    ] = "person",
    captions: Annotated[
        Literal["keep", "ignore"],
        typer.Option(
            "--captions",
            help="What to do with captions beside the pictures: .txt, metadata.csv or .jsonl, "
            "kohya's JSON.",
        ),
    ] = "keep",
    home: HomeOption = None,
) -> None:
    """Take in pictures (never changed; what can't be decoded is skipped and named).

    Running it again with more pictures adds those; one that was stopped goes on.
    """
    from services.datasets import add_pictures

    add_pictures(open_home(home), character, pictures, trigger, class_word, console, captions)


@dataset_app.command("caption")
def dataset_caption(character: CharacterArgument, home: HomeOption = None) -> None:
    """Tag and caption the pictures with the captioning models on Ray Serve, then render captions.

    Only pictures that a model has not yet seen are sent to it.
    """
    from services.datasets import caption_pictures
    from services.engine import running_ray

    farm = open_home(home)
    with running_ray(farm):
        caption_pictures(farm, [character], console)


@dataset_app.command("freeze")
def dataset_freeze(
    character: CharacterArgument,
    holdout: Annotated[
        float,
        typer.Option(min=0.0, max=0.5, help="Share kept out of training, as scoring references."),
    ] = 0.2,
    home: HomeOption = None,
) -> None:
    """Make an immutable dataset version; the same pictures and captions are not frozen twice."""
    from services.datasets import freeze_dataset

    freeze_dataset(open_home(home), character, holdout, console)


PictureArgument = Annotated[
    str, typer.Argument(help="Its name as `dataset show` lists it, or the sha256's first digits.")
]


@dataset_app.command("drop")
def dataset_drop(
    character: CharacterArgument,
    picture: PictureArgument,
    reason: Annotated[str, typer.Option("--reason", help="Kept with the decision.")] = "",
    home: HomeOption = None,
) -> None:
    """Leave a picture out of captioning and of every version from now on; nothing is deleted."""
    from services.datasets import decide_picture

    decide_picture(open_home(home), character, picture, False, reason, console)


@dataset_app.command("keep")
def dataset_keep(
    character: CharacterArgument,
    picture: PictureArgument,
    reason: Annotated[str, typer.Option("--reason", help="Kept with the decision.")] = "",
    home: HomeOption = None,
) -> None:
    """Take a dropped picture back in."""
    from services.datasets import decide_picture

    decide_picture(open_home(home), character, picture, True, reason, console)


@dataset_app.command("show")
def dataset_show(character: CharacterArgument, home: HomeOption = None) -> None:
    """The pictures, their captions, what was skipped and why, and the versions made so far."""
    from services.datasets import show_dataset

    show_dataset(open_home(home), character, console)

"""`lorafarm dataset add`, `caption`, `freeze` and `show`: from pictures to a dataset version.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from services.cli.options import CharacterArgument, HomeOption, console
from services.farm.settings import open_home


def add(
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
    from services.cli.dataset_intake import print_added
    from services.cli.progress import Display
    from services.datasets.steps import add_pictures

    farm = open_home(home)
    with Display(console) as display:
        added = add_pictures(farm, character, pictures, trigger, class_word, captions, display)
    print_added(added, console)


def caption(character: CharacterArgument, home: HomeOption = None) -> None:
    """Tag and caption the pictures with the captioning models on Ray Serve, then render captions.

    Only pictures that a model has not yet seen are sent to it.
    """
    from services.cli.dataset_intake import print_captioned
    from services.cli.progress import Display
    from services.datasets.steps import caption_pictures
    from services.farm.engine import running_ray

    farm = open_home(home)
    with running_ray(farm):
        with Display(console) as display:
            done = caption_pictures(farm, [character], display)
        print_captioned(done, console)


def freeze(
    character: CharacterArgument,
    holdout: Annotated[
        float,
        typer.Option(min=0.0, max=0.5, help="Share kept out of training, as scoring references."),
    ] = 0.2,
    home: HomeOption = None,
) -> None:
    """Make an immutable dataset version; the same pictures and captions are not frozen twice."""
    from services.cli.dataset_intake import print_frozen
    from services.cli.progress import Display
    from services.datasets.steps import freeze_dataset

    with Display(console) as display:
        frozen = freeze_dataset(open_home(home), character, holdout, display)
    print_frozen(frozen, console)


def show(character: CharacterArgument, home: HomeOption = None) -> None:
    """The pictures, their captions, what was skipped and why, and the versions made so far."""
    from services.cli.dataset_intake import print_overview
    from services.datasets.overview import describe_dataset

    print_overview(describe_dataset(open_home(home), character), console)

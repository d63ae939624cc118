"""The `lorafarm dataset` commands: reads arguments, calls the room, nothing else.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from services.cli.options import CharacterArgument, HomeOption, console
from services.farm.settings import open_home

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
    from services.datasets.steps import add_pictures

    add_pictures(open_home(home), character, pictures, trigger, class_word, console, captions)


@dataset_app.command("caption")
def dataset_caption(character: CharacterArgument, home: HomeOption = None) -> None:
    """Tag and caption the pictures with the captioning models on Ray Serve, then render captions.

    Only pictures that a model has not yet seen are sent to it.
    """
    from services.datasets.steps import caption_pictures
    from services.farm.engine import running_ray

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
    from services.datasets.steps import freeze_dataset

    freeze_dataset(open_home(home), character, holdout, console)


PictureArgument = Annotated[
    str, typer.Argument(help="Its name as `dataset show` lists it, or the sha256's first digits.")
]


@dataset_app.command("lint")
def dataset_lint(
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
    from services.datasets.lint import show_lint

    raise typer.Exit(show_lint(open_home(home), character, fix, as_json, console))


@dataset_app.command("check")
def dataset_check(
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
    from services.datasets.check import show_check

    raise typer.Exit(show_check(open_home(home), character, html, as_json, apply, console))


@dataset_app.command("review")
def dataset_review(
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
    from services.datasets.review import review_captions

    raise typer.Exit(review_captions(open_home(home), character, export, table, compare, console))


@dataset_app.command("edit")
def dataset_edit(
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
    from services.datasets.lint import edit_caption

    changes = [("add", tag) for tag in add or []]
    changes += [("remove", tag) for tag in remove or []]
    changes += [("leave", tag) for tag in leave or []]
    changes += [("prose", prose)] if prose is not None else []
    changes += [("caption", caption)] if caption is not None else []
    edit_caption(open_home(home), character, picture, changes, console)


@dataset_app.command("override")
def dataset_override(
    character: CharacterArgument,
    code: Annotated[str, typer.Argument(help="The finding's code, such as CAP113.")],
    picture: Annotated[
        str | None, typer.Option("--picture", help="For this picture only; else for all.")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Kept with the override.")] = "",
    home: HomeOption = None,
) -> None:
    """Accept a finding that blocks; every version from now on says who did, and why."""
    from services.datasets.lint import override_finding

    override_finding(open_home(home), character, code, picture, reason, console)


@dataset_app.command("drop")
def dataset_drop(
    character: CharacterArgument,
    picture: PictureArgument,
    reason: Annotated[str, typer.Option("--reason", help="Kept with the decision.")] = "",
    home: HomeOption = None,
) -> None:
    """Leave a picture out of captioning and of every version from now on; nothing is deleted."""
    from services.datasets.steps import decide_picture

    decide_picture(open_home(home), character, picture, False, reason, console)


@dataset_app.command("keep")
def dataset_keep(
    character: CharacterArgument,
    picture: PictureArgument,
    reason: Annotated[str, typer.Option("--reason", help="Kept with the decision.")] = "",
    home: HomeOption = None,
) -> None:
    """Take a dropped picture back in."""
    from services.datasets.steps import decide_picture

    decide_picture(open_home(home), character, picture, True, reason, console)


@dataset_app.command("show")
def dataset_show(character: CharacterArgument, home: HomeOption = None) -> None:
    """The pictures, their captions, what was skipped and why, and the versions made so far."""
    from services.datasets.steps import show_dataset

    show_dataset(open_home(home), character, console)


VersionArgument = Annotated[
    str, typer.Argument(help="A version as `aya@v2`; only `aya` means the newest.")
]
UrlHelp = (
    "s3://bucket/prefix, or a folder; `dataset_store` of the settings when left out. S3's endpoint "
    "and credentials: docs/datasets.md."
)


@dataset_app.command("use-captions")
def dataset_use_captions(character: CharacterArgument, home: HomeOption = None) -> None:
    """Use the captions that came with the pictures instead of rendered ones.

    They become edits: captioning again keeps them, and your own edit of a caption wins.
    """
    from services.datasets.versions import use_captions

    use_captions(open_home(home), character, console)


@dataset_app.command("diff")
def dataset_diff(
    before: Annotated[str, typer.Argument(help="The older version, such as `aya@v2`.")],
    after: Annotated[str, typer.Argument(help="The newer version, such as `aya@v3`.")],
    home: HomeOption = None,
) -> None:
    """What changed between two dataset versions: pictures, captions word by word, rules, models."""
    from services.datasets.versions import show_diff

    show_diff(open_home(home), before, after, console)


@dataset_app.command("export")
def dataset_export(
    version: VersionArgument,
    to: Annotated[Path, typer.Option("--to", help="A new folder, or that of an earlier export.")],
    form: Annotated[
        Literal["kohya", "imagefolder", "ai-toolkit", "csv"],
        typer.Option(
            "--format",
            help="kohya: .txt and dataset.toml. imagefolder: Hugging Face's metadata.jsonl. "
            "ai-toolkit: .txt with \\[trigger]. csv: metadata.csv.",
        ),
    ],
    views: Annotated[
        int | None,
        typer.Option(help="For kohya: how often an epoch shows each picture (num_repeats)."),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Write a dataset version's training pictures and captions for another trainer.

    The holdout stays out. Files that no export wrote are never written over.
    """
    from services.datasets.versions import export_dataset

    export_dataset(open_home(home), version, form, to, views, console)


@dataset_app.command("push")
def dataset_push(
    version: VersionArgument,
    to: Annotated[str | None, typer.Option("--to", help=UrlHelp)] = None,
    home: HomeOption = None,
) -> None:
    """Put a dataset version into a bucket or a shared folder; what is there already is skipped.

    Every file is read back and verified. Run it again when it was stopped: it goes on.
    """
    from services.datasets.versions import push_dataset

    push_dataset(open_home(home), version, to, console)


@dataset_app.command("pull")
def dataset_pull(
    version: VersionArgument,
    source: Annotated[str | None, typer.Option("--from", help=UrlHelp)] = None,
    home: HomeOption = None,
) -> None:
    """Fetch a dataset version from a bucket or a shared folder; every file is verified.

    Run it again when it was stopped: it goes on.
    """
    from services.datasets.versions import pull_dataset

    pull_dataset(open_home(home), version, source, console)

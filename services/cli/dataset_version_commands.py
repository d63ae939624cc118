"""`lorafarm dataset diff`, `export`, `push` and `pull`: what is done with frozen versions.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from services.cli.options import HomeOption, console
from services.farm.settings import open_home

VersionArgument = Annotated[
    str, typer.Argument(help="A version as `aya@v2`; only `aya` means the newest.")
]
URL_HELP = (
    "s3://bucket/prefix, or a folder; `dataset_store` of the settings when left out. S3's endpoint "
    "and credentials: docs/datasets.md."
)


def diff(
    before: Annotated[str, typer.Argument(help="The older version, such as `aya@v2`.")],
    after: Annotated[str, typer.Argument(help="The newer version, such as `aya@v3`.")],
    home: HomeOption = None,
) -> None:
    """What changed between two dataset versions: pictures, captions word by word, rules, models."""
    from services.cli.dataset_versions import print_comparison
    from services.datasets.versions import compare_versions

    print_comparison(compare_versions(open_home(home), before, after), console)


def export(
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
    from services.cli.dataset_versions import print_exported
    from services.datasets.versions import export_dataset

    print_exported(export_dataset(open_home(home), version, form, to, views), console)


def push(
    version: VersionArgument,
    to: Annotated[str | None, typer.Option("--to", help=URL_HELP)] = None,
    home: HomeOption = None,
) -> None:
    """Put a dataset version into a bucket or a shared folder; what is there already is skipped.

    Every file is read back and verified. Run it again when it was stopped: it goes on.
    """
    from services.cli.dataset_versions import print_pushed
    from services.cli.progress import Display
    from services.datasets.versions import push_dataset

    with Display(console) as display:
        pushed = push_dataset(open_home(home), version, to, display)
    print_pushed(pushed, console)


def pull(
    version: VersionArgument,
    source: Annotated[str | None, typer.Option("--from", help=URL_HELP)] = None,
    home: HomeOption = None,
) -> None:
    """Fetch a dataset version from a bucket or a shared folder; every file is verified.

    Run it again when it was stopped: it goes on.
    """
    from services.cli.dataset_versions import print_pulled
    from services.cli.progress import Display
    from services.datasets.versions import pull_dataset

    with Display(console) as display:
        pulled = pull_dataset(open_home(home), version, source, display)
    print_pulled(pulled, console)

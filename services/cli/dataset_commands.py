"""The group `lorafarm dataset`: its commands in the order in which `--help` lists them."""

from __future__ import annotations

import typer

from services.cli import dataset_curation_commands as curation
from services.cli import dataset_intake_commands as intake
from services.cli import dataset_version_commands as versions

dataset_app = typer.Typer(
    help="From a folder of pictures to an immutable, captioned dataset version.",
    no_args_is_help=True,
)

for command in (
    intake.add,
    intake.caption,
    intake.freeze,
    curation.lint,
    curation.check,
    curation.review,
    curation.edit,
    curation.override,
    curation.drop,
    curation.keep,
    intake.show,
    curation.use_captions,
    versions.diff,
    versions.export,
    versions.push,
    versions.pull,
):
    dataset_app.command()(command)

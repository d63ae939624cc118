"""A small, whole report for the report's tests: two trials, three checkpoints, one winner."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image

from services.report.data import (
    CaptionedPicture,
    CharacterReport,
    CheckpointResult,
    DatasetContent,
    ExportedFile,
    ReportData,
    SkippedFile,
    TrialResult,
    WinnerChoice,
)
from training import MEASURES, Interval, Measures

PROMPTS = ("portrait of ayachar, person", "close-up of ayachar, person, smiling")


def measures(identity: float, drift: float = 0.1) -> Measures:
    values = dict.fromkeys(MEASURES, 0.5) | {"identity": identity, "drift": drift}
    return {
        name: Interval(value=value, low=value - 0.05, high=value + 0.05)
        for name, value in values.items()
    }


def picture(color: str, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), color)


def checkpoint(
    step: int, identity: float, place: int, failed: tuple[str, ...] = ()
) -> CheckpointResult:
    pictures = (picture("red"), picture("blue"))
    return CheckpointResult(step, measures(identity), pictures, failed, place)


def character(name: str = "aya") -> CharacterReport:
    losses = tuple((step, 1 / step) for step in range(1, 21))
    trials = (
        TrialResult("t000000000001", "lora", 4, 61.0, (checkpoint(10, 0.4, 2),), losses),
        TrialResult(
            "t000000000002",
            "dora",
            8,
            75.5,
            (checkpoint(10, 0.6, 1), checkpoint(20, 0.9, 3, ("drift 0.31 is above 0.25",))),
            losses,
        ),
    )
    return CharacterReport(
        name=name,
        trigger="ayachar",
        class_word="person",
        family="sd15",
        base="stabilityai/sd",
        dataset=DatasetContent(
            "v0001-1a2b3c4d",
            "ab" * 32,
            (CaptionedPicture(picture("green"), "ayachar, person, smiling", "0001.png"),),
            skipped=(SkippedFile("notes.png", "not a picture: its bytes are text"),),
            duplicates=1,
        ),
        trials=trials,
        winner=WinnerChoice("t000000000002", 10, "rank 8 DoRA at step 10: highest identity 0.60."),
        prompts=PROMPTS,
        base_pictures=(picture("grey"), picture("white")),
        exports=(
            ExportedFile("aya.safetensors", "kohya", "cd" * 32, 3_412_992, 2e-6),
            ExportedFile("diffusers/w.safetensors", "diffusers", "ef" * 32, 812, None),
        ),
        reference="aya.sd15/1",
        aliases=("candidate",),
        recommended_weight=0.8,
        limits={"drift_max": 0.25},
        provenance={"embedder": "starter-clip@1"},
    )


def report(*characters: CharacterReport) -> ReportData:
    return ReportData(
        characters or (character(),), "21 November 2026", 125.0, provenance={"torch": "2.13.0"}
    )


def with_caption(caption: str) -> CharacterReport:
    whole = character()
    train = (CaptionedPicture(picture("green"), caption),)
    return replace(whole, dataset=replace(whole.dataset, train=train))

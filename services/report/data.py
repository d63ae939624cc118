"""What a report says, as plain values: filled by whoever ran the sweep, read by the page.

Trials' folders and facts in, frozen data classes out. It decides nothing about looks, and is told
which checkpoint won and how the others rank.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from training import METHOD_NAMES, Measures, Standing, read_metrics, step_folders

# A picture is a file, or already in memory.
Picture = Path | Image.Image

# Two trials may have one title; this much of the id tells them apart.
SHORT_ID = 5

# The packages whose versions decide what a run gives.
PACKAGES = (
    "lorafarm",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "ray",
    "mlflow",
    "onnxruntime",
    "numpy",
)


@dataclass(frozen=True)
class CheckpointResult:
    """A trial at a step: its measures (None: not scored), and its pictures, one per prompt."""

    step: int
    measures: Measures | None
    pictures: tuple[Picture, ...] = ()
    failed_guards: tuple[str, ...] = ()  # in words, such as "drift 0.31 is above 0.25"
    place: int | None = None  # in the sweep's ranking; 1 is the winner, None was not scored


@dataclass(frozen=True)
class TrialResult:
    """A trial: what was trained, how long it took, what came of it."""

    trial: str
    method: str  # "lora" | "dora"
    rank: int
    seconds: float  # of training; in a pack its share
    checkpoints: tuple[CheckpointResult, ...]
    losses: tuple[tuple[int, float], ...] = ()  # (step, loss)
    variant: str = ""  # what tells it from others of its method and rank, in words
    views_per_step: float | None = None  # of each training picture, on average
    note: str = ""  # what must be known of it, such as that its rank is approximate

    @property
    def title(self) -> str:
        title = f"rank {self.rank} {METHOD_NAMES.get(self.method, self.method)}"
        return f"{title}, {self.variant}" if self.variant else title


@dataclass(frozen=True)
class WinnerChoice:
    """The chosen checkpoint, and why: whole sentences that name it."""

    trial: str
    step: int
    reason: str
    passed_guards: bool = True


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture of the dataset version with the caption that it was trained with."""

    picture: Picture
    caption: str
    name: str = ""


@dataclass(frozen=True)
class SkippedFile:
    """A file of the folder that did not become a picture, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class DatasetContent:
    """The dataset version that all trials share."""

    version: str  # vNNNN-hash8
    manifest_sha256: str
    train: tuple[CaptionedPicture, ...]
    holdout: tuple[CaptionedPicture, ...] = ()
    skipped: tuple[SkippedFile, ...] = ()
    duplicates: int = 0


@dataclass(frozen=True)
class ExportedFile:
    """An exported, verified adapter file."""

    name: str
    format: str  # "kohya" | "diffusers"
    sha256: str
    size_bytes: int
    max_error: float | None = None  # largest difference of outputs found when it was re-read


@dataclass(frozen=True)
class CharacterReport:
    """Everything about one character's sweep.

    `prompts`, `base_pictures` and every checkpoint's `pictures` have the same length and order:
    each column is one prompt at one seed.
    """

    name: str
    trigger: str
    class_word: str
    family: str
    base: str
    dataset: DatasetContent
    trials: tuple[TrialResult, ...]
    winner: WinnerChoice | None
    prompts: tuple[str, ...] = ()
    base_pictures: tuple[Picture, ...] = ()
    exports: tuple[ExportedFile, ...] = ()
    reference: str = ""  # "aya.sd15/3", when registered
    aliases: tuple[str, ...] = ()
    recommended_weight: float = 1.0
    limits: Mapping[str, float] = field(default_factory=dict)  # guard name to limit
    provenance: Mapping[str, str] = field(default_factory=dict)  # hashes, embedder, seeds, ...
    notes: tuple[str, ...] = ()  # what limits the trust in the scores, in sentences

    def __post_init__(self) -> None:
        """Raise ValueError when a row of pictures does not fit the prompts, or the winner is none.

        A page with shifted columns would compare pictures of different prompts.
        """
        rows = [("the base model", self.base_pictures)] + [
            (f"{trial.trial} at step {checkpoint.step}", checkpoint.pictures)
            for trial in self.trials
            for checkpoint in trial.checkpoints
        ]
        for name, pictures in rows:
            if pictures and len(pictures) != len(self.prompts):
                raise ValueError(
                    f"{self.name}: {name} has {len(pictures)} pictures for "
                    f"{len(self.prompts)} prompts"
                )
        if self.winner is not None and self.winning_checkpoint is None:
            raise ValueError(
                f"{self.name}: the winner {self.winner.trial} at step {self.winner.step} is not "
                "among the trials"
            )

    def title(self, trial: TrialResult) -> str:
        """The trial's title; with the start of its id where another trial has the same one."""
        same = [other for other in self.trials if other.title == trial.title]
        return trial.title if len(same) == 1 else f"{trial.title} ({trial.trial[:SHORT_ID]})"

    @property
    def winning_trial(self) -> TrialResult | None:
        wanted = self.winner.trial if self.winner else None
        return next((trial for trial in self.trials if trial.trial == wanted), None)

    @property
    def winning_checkpoint(self) -> CheckpointResult | None:
        if self.winner is None or self.winning_trial is None:
            return None
        checkpoints = self.winning_trial.checkpoints
        return next((c for c in checkpoints if c.step == self.winner.step), None)


@dataclass(frozen=True)
class ReportData:
    """A whole report."""

    characters: tuple[CharacterReport, ...]
    created: str  # date and time, as it shall be read
    seconds: float | None  # from the first picture to the last verified file, when known
    title: str = "Sweep report"
    provenance: Mapping[str, str] = field(default_factory=dict)  # the machine, versions, ...


def read_trial(
    trial_dir: Path,
    *,
    trial: str,
    method: str,
    rank: int,
    standings: Mapping[int, Standing] | None = None,
    seconds: float | None = None,
    variant: str = "",
    views_per_step: float | None = None,
    note: str = "",
) -> TrialResult:
    """The result that lies in a trial's folder.

    `standings` are the trial's places in the sweep's ranking, by step; other checkpoints were not
    scored as the sweep asks. The pictures are those of the first seed. `seconds` is summed from the
    trial's shares of the steps' times when not given. Raises ValueError for a malformed
    `metrics.jsonl`.
    """
    rows = read_metrics(trial_dir)
    checkpoints = tuple(
        checkpoint_result(step, folder, (standings or {}).get(step))
        for step, folder in step_folders(trial_dir).items()
    )
    # A step's time is that of all trials in the pack; shares add up to what was spent.
    shares = (row.values.get("step_ms", 0.0) / row.values.get("pack", 1) for row in rows)
    spent = sum(shares) / 1000
    return TrialResult(
        trial=trial,
        method=method,
        rank=rank,
        seconds=spent if seconds is None else seconds,
        checkpoints=checkpoints,
        losses=tuple((row.step, row.values["loss"]) for row in rows if "loss" in row.values),
        variant=variant,
        views_per_step=views_per_step,
        note=note,
    )


def checkpoint_result(step: int, folder: Path, standing: Standing | None) -> CheckpointResult:
    """What a report shows of a checkpoint in `folder` with this place in the sweep's ranking."""
    if standing is None:
        return CheckpointResult(step, None)
    score = standing.candidate.score
    return CheckpointResult(
        step, score.measures(), score.row(folder), standing.failed_guards, standing.place
    )


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide what a run gives."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions

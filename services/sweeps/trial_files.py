"""What a trial leaves on disk, read back as plain values for the registry and the report.

A trial's folder in, metric rows, measures and pictures out. Knows the files `metrics.jsonl`,
`effective_batch.json` and `step-NNNNNN/scores.json`; never writes, and never imports the training
code (and so no torch).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

METRICS_FILE = "metrics.jsonl"
SCORES_FILE = "scores.json"
EFFECTIVE_FILE = "effective_batch.json"
EFFECTIVE_FIELDS = ("effective_batch_size", "effective_accumulation")
# The measures of a score, in the order in which people see them.
MEASURES = ("identity", "prompt_fidelity", "drift", "leak", "memorisation", "diversity")

_STEP_FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Interval:
    """A measure with its bootstrap 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


class IntervalLike(Protocol):
    """What counts as an interval: ours, or that of a score just made."""

    @property
    def value(self) -> float: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


Measures = Mapping[str, IntervalLike]


@dataclass(frozen=True)
class MetricRow:
    """One optimiser step as `metrics.jsonl` has it; `values` holds finite numbers only."""

    step: int
    values: Mapping[str, float]


def step_folders(trial_dir: Path) -> dict[int, Path]:
    """The trial's checkpoint folders by step, in order; temporary ones are left out."""
    found = {}
    for folder in trial_dir.iterdir() if trial_dir.is_dir() else ():
        match = _STEP_FOLDER.fullmatch(folder.name)
        if match and folder.is_dir():
            found[int(match.group(1))] = folder
    return dict(sorted(found.items()))


def read_metrics(trial_dir: Path) -> list[MetricRow]:
    """The rows of `metrics.jsonl` by step; of two rows for one step the later one counts.

    A last line without its newline is what a killed process left, and is passed over. Raises
    ValueError naming file and line for any other line that is not a JSON object with a step.
    """
    path = trial_dir / METRICS_FILE
    if not path.exists():
        return []
    *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    rows: dict[int, MetricRow] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a row with a step: {line[:80]!r}") from (
                error
            )
        rows[step] = MetricRow(step, _finite_numbers(row))
    return [rows[step] for step in sorted(rows)]


def read_effective_batch(trial_dir: Path) -> dict[str, str]:
    """What a trial that ran out of memory was trained with instead; empty for the others."""
    path = trial_dir / EFFECTIVE_FILE
    if not path.exists():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return {field: str(data[field]) for field in EFFECTIVE_FIELDS}


def read_measures(checkpoint_dir: Path) -> Measures | None:
    """The measures in a checkpoint's `scores.json`; None when it was not scored.

    Raises ValueError naming the file when a measure of `MEASURES` is missing or malformed.
    """
    path = checkpoint_dir / SCORES_FILE
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    try:
        return {
            name: Interval(
                float(data[name]["value"]), float(data[name]["low"]), float(data[name]["high"])
            )
            for name in MEASURES
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: measure {error} is missing or has no value, low, high") from (
            error
        )


@dataclass(frozen=True)
class SamplePicture:
    """A picture that was made for a score, and its prompt."""

    file: Path
    prompt: str


def read_samples(folder: Path, seed_index: int = 0) -> tuple[SamplePicture, ...]:
    """The character's pictures at one seed, one per prompt: a row of a contact sheet.

    `folder` is a checkpoint's, or that of the bare base's scores; none when it was not scored.
    Raises ValueError naming the file when `scores.json` does not list its pictures.
    """
    path = folder / SCORES_FILE
    if not path.exists():
        return ()
    try:
        return tuple(
            SamplePicture(folder / entry["file"], str(entry["prompt"]))
            for entry in json.loads(path.read_text(encoding="utf-8"))["pictures"]
            if entry["kind"] == "subject" and entry["seed_index"] == seed_index
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: no list of pictures with file, kind, prompt ({error})") from (
            error
        )


def _finite_numbers(row: Mapping[str, object]) -> dict[str, float]:
    """The numeric fields but for the step counters; NaN and infinity are no points on a curve."""
    return {
        key: float(value)
        for key, value in row.items()
        if key not in ("step", "steps")
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }

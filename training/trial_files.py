"""What a trial leaves on disk besides its weights, read back as plain values.

A trial's folder in, metric rows, scores and the reason of a failure out. It knows the files
`metrics.jsonl`, `effective_batch.json`, `failed.json` and `step-NNNNNN/scores.json`; the training
writes them. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from training.metrics_file import METRICS_FILE
from training.scoring.measures import Interval
from training.scoring.scores import SCORES_FILE, Score

EFFECTIVE_FILE = "effective_batch.json"
FAILED_FILE = "failed.json"
# Fields of `effective_batch.json`.
BATCH_SIZE, ACCUMULATION = "effective_batch_size", "effective_accumulation"

#: The measures of a score by name, in the order in which people see them.
Measures = Mapping[str, Interval]


@dataclass(frozen=True)
class MetricRow:
    """One optimiser step as `metrics.jsonl` has it; `values` holds finite numbers only."""

    step: int
    values: Mapping[str, float]


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
    return {name: str(data[name]) for name in (BATCH_SIZE, ACCUMULATION)}


def read_failure(trial_dir: Path) -> str | None:
    """The error that ended a trial; None if none did."""
    path = trial_dir / FAILED_FILE
    if not path.exists():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["error"])


def read_score(checkpoint_dir: Path) -> Score | None:
    """A checkpoint's score; None when it was not scored. Raises UserError if it is malformed."""
    return Score.load(checkpoint_dir) if (checkpoint_dir / SCORES_FILE).exists() else None


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

"""The file of rows in a trial's folder, `metrics.jsonl`: one line of JSON for every step taken.

Rows are added at the end and cut back to a checkpoint's step; nothing is computed here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from captioning import write_atomic

METRICS_FILE = "metrics.jsonl"
Row = dict[str, Any]


def append_row(trial_dir: Path, row: Row) -> None:
    """Add a step's row to the trial's `metrics.jsonl`."""
    with (trial_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def drop_rows_after(trial_dir: Path, step: int) -> None:
    """Keep the rows up to `step`; later ones, and a half-written last one, are trained again."""
    path = trial_dir / METRICS_FILE
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] > step:
            break
        kept.append(line + "\n")
    write_atomic(path, "".join(kept).encode())

"""Rows of JSON, one a line: how the store keeps lists that people may want to read.

Lists of plain values in and out; a file is always written whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from captioning.store import write_atomic


def to_lines(rows: Iterable[dict[str, Any]]) -> str:
    """One JSON object a line, every line ended."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none when there is no file."""
    if not path.exists():
        return []
    # Not splitlines(): a file name may hold U+2028 and its like, which JSON leaves as they are.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write all rows, atomically."""
    write_atomic(path, to_lines(rows).encode())

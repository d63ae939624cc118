"""What an export says about the file that it wrote.

It is a file of its own, since a report is read back long after the export, and without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Format = Literal["kohya", "diffusers"]


@dataclass(frozen=True)
class ExportReport:
    """A verified file."""

    path: Path
    format: Format
    form: str  # "lora", "dora" or "diff" (kohya), "peft" or "full" (diffusers)
    sha256: str
    size_bytes: int
    modules: int  # how many layers it changes
    max_error: float  # largest difference of an output element after the reload
    effect: float  # largest change of an output element by the adapter

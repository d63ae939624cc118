"""How much of a file this process has mapped into its memory."""

from __future__ import annotations

from pathlib import Path


def mapped_kb(file: Path, field: str) -> int:
    """The sum of a field over this process's mappings of `file`, from /proc/self/smaps."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(" ", 1)[0].endswith(":"):  # the header of a mapping
            inside = line.endswith(str(file))
        elif inside and line.startswith(f"{field}:"):
            total += int(line.split()[1])
    return total

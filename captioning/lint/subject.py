"""What lint looks at: one picture's caption beside what the models said, and where words stand."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from captioning.findings import Finding
from captioning.lint.codes import CODES
from captioning.render import Caption
from captioning.render_tags import Seen

WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")


@dataclass(frozen=True)
class Captioned:
    """One picture: its caption, and what the models said about it."""

    image: str  # sha256
    caption: Caption
    seen: Seen = field(default_factory=Seen)


@lru_cache(50_000)
def _whole(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)


def place_of(words: str, text: str, after: int = 0) -> tuple[int, int] | None:
    """(start, end) of the first whole occurrence of `words` in `text`; None when there is none."""
    found = _whole(words).search(text, after)
    return found.span() if found else None


def finding(
    code: str,
    where: str,
    message: str,
    value: float | str | None = None,
    limit: float | str | None = None,
    place: tuple[int, int] | None = None,
    others: tuple[str, ...] = (),
) -> Finding:
    """A finding with the severity and hint of its code."""
    kind = CODES[code]
    start, end = place or (None, None)
    return Finding(
        code=code,
        severity=kind.severity,
        where=where,
        message=message,
        value=value,
        limit=limit,
        hint=kind.hint,
        start=start,
        end=end,
        others=others,
    )

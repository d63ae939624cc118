"""How long work tells of its progress, without knowing who watches: a terminal, a page, nobody.

A protocol, and the one implementation that needs no watcher. Texts are plain, without markup.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol

Tone = Literal["plain", "warning", "error"]


class Step(Protocol):
    """One long step of the work."""

    def advance_to(self, done: int, total: int) -> None:
        """So much is done; the rooms below call it with (done, total)."""

    def note(self, text: str) -> None:
        """A few words that replace the last ones, such as the loss."""


class Progress(Protocol):
    """Whoever watches the work."""

    def step(self, title: str, total: int | None = None) -> AbstractContextManager[Step]:
        """A step that lasts as long as the `with` block; `total` when it is known already."""

    def say(self, text: str, tone: Tone = "plain") -> None:
        """A sentence about what has happened, to be kept."""


class Unwatched:
    """A `Progress`, and its `Step`, for work that nobody watches."""

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        yield self

    def say(self, text: str, tone: Tone = "plain") -> None: ...

    def advance_to(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


UNWATCHED: Progress = Unwatched()

"""Progress at the terminal: live bars there, one line per finished step in a log.

This is the `Progress` of `services.farm.progress` for a person who watches; it decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from services.farm.progress import Tone

STYLES: dict[Tone, str] = {"plain": "", "warning": "yellow", "error": "red"}
# In a log without a terminal a long step says this often that it is alive.
LOG_INTERVAL_S = 30.0


class Display:
    """One live area with a bar for each running step."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not self._live,
        )

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str, tone: Tone = "plain") -> None:
        """A line that stays."""
        self.console.print(f"  {text}", style=STYLES[tone], markup=False, highlight=False)

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        """A bar while the block runs, and a line with the time it took when it ends well."""
        step = Step(self, title, total)
        try:
            yield step
        finally:
            self._progress.remove_task(step.task)
        done = f"[green]✓[/] {escape(title)} [dim]{step.summary()}[/]"
        self.console.print(done, highlight=False)


class Step:
    """One long step with its bar."""

    def __init__(self, display: Display, title: str, total: int | None) -> None:
        self._display = display
        self._title = title
        self._started = time.monotonic()
        self._last_line = self._started
        self._done, self._total = 0, total
        self._first: tuple[float, int] | None = None  # when and where it began to advance
        self._note = ""
        self.task: TaskID = display._progress.add_task(title, total=total, note="")

    def advance_to(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        now = time.monotonic()
        self._first = self._first or (now, done)
        note = self._note or self._pace(now)
        self._display._progress.update(self.task, completed=done, total=total, note=note)
        self._log_line()

    def note(self, text: str) -> None:
        """A few words beside the bar, such as the loss."""
        self._note = text
        self._display._progress.update(self.task, note=text)

    def summary(self) -> str:
        count = f"{self._done}/{self._total}, " if self._total else ""
        return f"{count}{time.monotonic() - self._started:.1f} s"

    def _log_line(self) -> None:
        now = time.monotonic()
        if self._display._live or now - self._last_line < LOG_INTERVAL_S:
            return
        self._last_line = now
        notes = ", ".join(text for text in (self._note, self._pace(now)) if text)
        self._display.say(
            f"… {self._title}: {self._done}/{self._total}{f' ({notes})' if notes else ''}"
        )

    def _pace(self, now: float) -> str:
        """Rate and time left; what an earlier run had done before does not count."""
        if self._first is None or self._total is None:
            return ""
        since, before = self._first
        if now <= since or self._done <= before:
            return ""
        rate = (self._done - before) / (now - since)
        return f"{rate:.2g}/s, about {(self._total - self._done) / rate:.0f} s left"

"""Progress in a log: one line per finished step, none for a step that failed."""

import io
import re

import pytest
from rich.console import Console

from services.cli import progress
from services.cli.progress import Display


def written(stream: io.StringIO) -> list[str]:
    return [line for line in stream.getvalue().splitlines() if line.strip()]


def test_a_finished_step_is_one_line_with_count_and_time():
    stream = io.StringIO()
    with Display(Console(file=stream)) as display, display.step("pictures taken in") as step:
        for done in range(1, 4):
            step.advance_to(done, 3)
    (line,) = written(stream)
    assert "pictures taken in" in line and "3/3" in line and line.rstrip().endswith("s")


def test_a_failed_step_says_nothing_of_being_done():
    stream = io.StringIO()
    with (
        pytest.raises(ValueError, match="broken"),
        Display(Console(file=stream)) as display,
        display.step("training"),
    ):
        raise ValueError("broken")
    assert not written(stream)


def test_a_long_step_tells_rate_and_time_left_without_what_was_done_before(
    monkeypatch: pytest.MonkeyPatch,
):
    seconds = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    stream = io.StringIO()
    with Display(Console(file=stream)) as display, display.step("observed") as step:
        step.advance_to(900, 1000)
        step.advance_to(950, 1000)
    lines = written(stream)
    rate, left = re.search(r"950/1000 \(([\d.]+)/s, about (\d+) s left\)", lines[1]).groups()
    assert float(left) == pytest.approx(50 / float(rate), rel=0.1)

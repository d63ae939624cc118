"""Progress in a log: one line per finished step, none for a step that failed."""

import io

import pytest
from rich.console import Console

from services.progress import Display


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

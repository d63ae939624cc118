"""The leaderboard: every scored checkpoint of a sweep, the winner first, with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from services.farm.settings import Home
from services.sweeps.leaderboard import leaderboard
from training import Candidate, Standing, Winner, approximation

SHORT_HEADINGS = {
    "fid.": "prompt fidelity",
    "drift": "drift",
    "leak": "leak",
    "mem.": "memorisation",
    "div.": "diversity",
}


def leaderboard_command(home: Home, character: str, report: Path | None, console: Console) -> None:
    """`lorafarm leaderboard`: the newest scored sweep, and its report where a file is named."""
    found = leaderboard(home, character)
    sweep = found.sweep
    if sweep.unscored:
        console.print(
            f"[yellow]note:[/] nothing of the newest sweep, {sweep.unscored}, is scored yet; this "
            f"is {sweep.asked.sweep} of {sweep.asked.started}"
        )
    print_leaderboard(found.winner, console)
    if report is not None:
        from services.report.sweep_report import write_report

        write_report(home, [character], report)
        console.print(f"report: {report}")


def print_leaderboard(winner: Winner, console: Console) -> None:
    """A table of all checkpoints, then the reason in a sentence."""
    keys = _keys(winner)
    # One text for all rows: drawing a table of Rich's takes longer than reading a large sweep.
    console.print(_table(winner, keys), no_wrap=True, overflow="ellipsis")
    console.print(winner.reason, markup=False)
    for words, key in keys.items():
        if words:
            console.print(f"[dim]{key.strip()}: {escape(words)}[/]")
    nested = {s.candidate.nested_ranks for s in winner.table if s.candidate.nested_ranks}
    if nested:
        console.print(f"[dim]≈ {'; '.join(approximation(ranks) for ranks in sorted(nested))}[/]")
    named = ", ".join(f"{short} {long}" for short, long in SHORT_HEADINGS.items() if short != long)
    base = winner.candidate.score.base_identity
    console.print(
        f"[dim]views of each training picture up to that step; {named}[/]\n"
        f"[dim]identity: 0 is the bare base {escape(str(base))}, 1 the references among "
        "themselves; = tied with the winner; dim rows fail a guard[/]"
    )


def _table(winner: Winner, keys: Mapping[str, str]) -> Text:
    """A line per checkpoint below the headings.

    There are no rules between columns, so that every number can be read on 80 columns.
    """
    headings = ("", "network", "step", "views", "identity", *SHORT_HEADINGS)
    rows = [_row(standing, keys) for standing in winner.table]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    table = Text(f"\n{_line(headings, widths)}\n")
    table.append(f" {'─' * (sum(widths) + 2 * (len(widths) - 1))}\n")
    for standing, row in zip(winner.table, rows, strict=True):
        line = Text(_line(row, widths) + "\n", style="dim" if standing.failed_guards else "")
        if standing.place == 1:
            line.stylize("green", 1, 2)
        table.append_text(line)
    return table


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return f" {'  '.join(padded)}"


def _row(standing: Standing, keys: Mapping[str, str]) -> tuple[str, ...]:
    candidate = standing.candidate
    score = candidate.score
    return (
        "★" if standing.place == 1 else ("=" if standing.tied else ""),
        _network(candidate, keys),
        str(candidate.step),
        "" if candidate.views is None else f"{candidate.views:.0f}",
        str(score.identity),
        f"{score.prompt_fidelity.value:.2f}",
        f"{score.drift.value:.2f}",
        f"{score.leak.value:.2f}",
        f"{score.memorisation.value:.2f}",
        f"{score.diversity.value:.2f}",
    )


def _network(candidate: Candidate, keys: Mapping[str, str]) -> str:
    mark = "≈" if candidate.nested_ranks else ""
    return f"{candidate.method} r{candidate.rank}{mark}{keys[candidate.variant]}"


def _keys(winner: Winner) -> dict[str, str]:
    """` #1`, ` #2`, ... for each variant: its words would leave no room for the numbers."""
    variants = dict.fromkeys(standing.candidate.variant for standing in winner.table)
    named = [words for words in variants if words]
    return {"": ""} | {words: f" #{number}" for number, words in enumerate(named, start=1)}

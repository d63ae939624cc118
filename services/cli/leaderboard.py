"""The leaderboard: every scored checkpoint of a sweep, the winner first, with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.farm.settings import Home
from services.sweeps.leaderboard import leaderboard
from training import Candidate, Interval, Winner, approximation

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
    # Without rules between columns, so that every number can be read on 80 columns.
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", min_width=1)
    for heading in ("network", "step", "views", "identity", *SHORT_HEADINGS):
        table.add_column(heading, no_wrap=True)
    keys = _keys(winner)
    for standing in winner.table:
        candidate = standing.candidate
        score = candidate.score
        mark = "[green]★[/]" if standing.place == 1 else ("=" if standing.tied else "")
        row = [
            mark,
            _network(candidate, keys),
            str(candidate.step),
            "" if candidate.views is None else f"{candidate.views:.0f}",
            _interval(score.identity),
            f"{score.prompt_fidelity.value:.2f}",
            f"{score.drift.value:.2f}",
            f"{score.leak.value:.2f}",
            f"{score.memorisation.value:.2f}",
            f"{score.diversity.value:.2f}",
        ]
        table.add_row(*row, style="dim" if standing.failed_guards else "")
    console.print(table)
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
        f"[dim]identity: 0 is the bare base {_interval(base)}, 1 the references among themselves; "
        "= tied with the winner; dim rows fail a guard[/]"
    )


def _network(candidate: Candidate, keys: Mapping[str, str]) -> str:
    mark = "≈" if candidate.nested_ranks else ""
    return f"{candidate.method} r{candidate.rank}{mark}{keys[candidate.variant]}"


def _keys(winner: Winner) -> dict[str, str]:
    """` #1`, ` #2`, ... for each variant: its words would leave no room for the numbers."""
    variants = dict.fromkeys(standing.candidate.variant for standing in winner.table)
    named = [words for words in variants if words]
    return {"": ""} | {words: f" #{number}" for number, words in enumerate(named, start=1)}


def _interval(interval: Interval) -> str:
    return rf"{interval.value:.2f} \[{interval.low:.2f}, {interval.high:.2f}]"

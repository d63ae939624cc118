"""Shows what lint says of captions: to a person by code, to a program as one JSON object a line."""

from __future__ import annotations

import json
from itertools import groupby

from rich.console import Console
from rich.markup import escape

from captioning import CODES, Finding, Severity
from services.datasets.lint import LintResult, as_rows

COLOURS: dict[Severity, str] = {"block": "red", "warn": "yellow", "info": "dim"}
SHOWN_PER_CODE = 5  # pictures of one code in the list for people; --json gives all


def print_lint_rows(result: LintResult) -> None:
    """One JSON object a line, on stdout as it is."""
    for row in as_rows(result):
        print(json.dumps(row, ensure_ascii=False))


def print_lint(result: LintResult, name: str, fix: bool, console: Console) -> None:
    """The findings by code, worst first, and how many there are of each severity."""
    if fix:
        console.print(
            f"{len(result.fixed)} edits recorded; `dataset show {name}` shows the captions"
        )
    _print_findings(result, console)
    console.print(
        f"{len(result.captions)} captions: [red]{result.count('block')} block[/]"
        + (f" ({result.overridden} overridden)" if result.overridden else "")
        + f", [yellow]{result.count('warn')} warn[/], {result.count('info')} info"
    )


def _print_findings(result: LintResult, console: Console) -> None:
    """What each code means, where it was found, and what to do."""
    texts = {one.image: one.caption.text for one in result.captions}
    for code, group in groupby(result.findings, key=lambda found: found.code):
        of_code, kind = list(group), CODES[code]
        console.print(
            f"[{COLOURS[kind.severity]}]{code} {kind.severity}[/] [bold]{kind.title}[/] × "
            f"{len(of_code)}  [dim]→ {kind.hint}[/]"
        )
        for found in of_code[:SHOWN_PER_CODE]:
            source = escape(result.source(found))
            console.print(f"    {source}: {escape(found.message)}", soft_wrap=True)
            if found.start is not None and kind.severity != "info":
                console.print(f"      {_marked(texts[found.where], found)}", soft_wrap=True)
        if len(of_code) > SHOWN_PER_CODE:
            console.print(f"    [dim]and {len(of_code) - SHOWN_PER_CODE} more[/]")


def _marked(text: str, found: Finding) -> str:
    """The caption with the words in question set off."""
    start, end = found.start or 0, found.end or 0
    before, words, after = (escape(part) for part in (text[:start], text[start:end], text[end:]))
    return f"[dim]{before}[/][reverse]{words}[/][dim]{after}[/]"

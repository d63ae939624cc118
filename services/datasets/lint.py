"""`dataset lint`, `dataset edit` and `dataset override`: what is wrong with captions, put right.

Thin: the captioning room finds and decides, this file shows it to a person or a program.
"""

from __future__ import annotations

import json
from itertools import groupby

from rich.console import Console
from rich.markup import escape

from captioning import (
    CODES,
    Captioned,
    Character,
    Edit,
    Finding,
    Override,
    Store,
    UserError,
    blocking,
    caption_all,
    captioned,
    find_image,
    fixes,
    lint_captions,
    load_captions,
    load_character,
    load_images,
    load_overrides,
    override,
    record_edits,
)
from services.farm.settings import Home

COLOURS = {"block": "red", "warn": "yellow", "info": "dim"}
SHOWN_PER_CODE = 5  # pictures of one code in the list for people; --json gives all
BLOCKED = 2  # exit code, as for all that a person has to mend


def show_lint(home: Home, name: str, fix: bool, as_json: bool, console: Console) -> int:
    """Print what is wrong with the captions of `name`; `fix` records the mechanical edits first.

    Gives the exit code: 0, or 2 when something blocks that nobody has overridden.
    """
    store, character = home.store, load_character(home.store, name)
    captions = captioned(store, character)
    findings = lint_captions(captions, character)
    edits: list[Edit] = []
    if fix and (edits := fixes(findings, captions, character)):
        record_edits(store, name, edits)
        caption_all(store, character)
        captions = captioned(store, character)
        findings = lint_captions(captions, character)
    overrides = load_overrides(store, name)
    stops = blocking(findings, overrides)
    if as_json:
        _print_rows(store, name, findings, stops)
        return BLOCKED if stops else 0
    if fix:
        console.print(f"{len(edits)} edits recorded; `dataset show {name}` shows the captions")
    _print_findings(_sources(store, name), captions, findings, console)
    counts = {severity: _count(findings, severity) for severity in COLOURS}
    accepted = counts["block"] - len(stops)
    console.print(
        f"{len(captions)} captions: [red]{counts['block']} block[/]"
        + (f" ({accepted} overridden)" if accepted else "")
        + f", [yellow]{counts['warn']} warn[/], {counts['info']} info"
    )
    return BLOCKED if stops else 0


def edit_caption(
    home: Home,
    name: str,
    picture: str,
    changes: list[tuple[str, str]],
    console: Console,
) -> None:
    """Record changes (action, value) of one picture's caption, and show it before and after."""
    store, character = home.store, load_character(home.store, name)
    image = find_image(store, name, picture)
    if not changes:
        raise UserError(
            "edit", "nothing to change", "give --add, --remove, --leave, --prose or --caption"
        )
    before = load_captions(store, name).get(image.sha256, "")
    edits = _edits(image.sha256, changes, before)
    after = _rendered_with(store, character, image.sha256, edits)
    record_edits(store, name, [edit.model_copy(update={"after": after}) for edit in edits])
    caption_all(store, character)
    console.print(f"[dim]before[/] {escape(before)}", soft_wrap=True)
    console.print(f"[green]after[/]  {escape(after)}", soft_wrap=True)


def override_finding(
    home: Home, name: str, code: str, picture: str | None, reason: str, console: Console
) -> None:
    """Record that a person accepts a code, for one picture or for all of the character's."""
    store = home.store
    load_character(store, name)
    where = find_image(store, name, picture).sha256 if picture else ""
    override(store, name, Override(code=_known_code(code), where=where, reason=reason))
    console.print(f"[green]✓[/] {code} is accepted for {picture or f'all pictures of {name}'}")


def _known_code(code: str) -> str:
    """The code itself; image codes (IMG...) are the curation's, and taken as they are."""
    if code in CODES or (code.startswith("IMG") and code[3:].isdigit() and len(code) == 6):
        return code
    raise UserError(
        f"code {code}", "there is no such code", "`lorafarm dataset lint` names those that it found"
    )


def _edits(sha256: str, changes: list[tuple[str, str]], before: str) -> list[Edit]:
    try:
        return [
            Edit.model_validate(
                {"image": sha256, "action": action, "value": value, "before": before}
            )
            for action, value in changes
        ]
    except ValueError as error:
        bad = next(value for _, value in changes if not value.strip(" ,"))
        raise UserError("edit", f"{bad!r} is no tag", "write a word or two") from error


def _rendered_with(store: Store, character: Character, sha256: str, edits: list[Edit]) -> str:
    """The caption as it will be, before anything is written."""
    from captioning import corrections, load_edits, load_seen, render_all

    pictures = load_seen(store, character)
    if sha256 not in pictures:
        raise UserError("edit", "the picture is dropped", "take it back in with `dataset keep`")
    human = corrections([*load_edits(store, character.name), *edits])
    return render_all(pictures, character, human)[sha256].text


def _print_rows(store: Store, name: str, findings: list[Finding], stops: list[Finding]) -> None:
    """One JSON object a line, on stdout as it is: for programs."""
    sources = _sources(store, name)
    for found in findings:
        row = {"picture": sources.get(found.where, found.where)} | found.model_dump()
        print(json.dumps(row | {"blocks": found in stops}, ensure_ascii=False))


def _print_findings(
    sources: dict[str, str], captions: list[Captioned], findings: list[Finding], console: Console
) -> None:
    """By code, worst first: what it is, where, and what to do."""
    texts = {one.image: one.caption.text for one in captions}
    for code, group in groupby(findings, key=lambda found: found.code):
        of_code, kind = list(group), CODES[code]
        colour = COLOURS[kind.severity]
        console.print(
            f"[{colour}]{code} {kind.severity}[/] [bold]{kind.title}[/] × {len(of_code)}"
            f"  [dim]→ {kind.hint}[/]"
        )
        for found in of_code[:SHOWN_PER_CODE]:
            source = sources.get(found.where, found.where)
            console.print(f"    {escape(source)}: {escape(found.message)}", soft_wrap=True)
            if found.start is not None and kind.severity != "info":
                console.print(f"      {_marked(texts[found.where], found)}", soft_wrap=True)
        if len(of_code) > SHOWN_PER_CODE:
            console.print(f"    [dim]and {len(of_code) - SHOWN_PER_CODE} more[/]")


def _marked(text: str, found: Finding) -> str:
    """The caption with the words in question set off."""
    start, end = found.start or 0, found.end or 0
    before, words, after = (escape(part) for part in (text[:start], text[start:end], text[end:]))
    return f"[dim]{before}[/][reverse]{words}[/][dim]{after}[/]"


def _sources(store: Store, name: str) -> dict[str, str]:
    return {image.sha256: image.source for image in load_images(store, name)}


def _count(findings: list[Finding], severity: str) -> int:
    return sum(found.severity == severity for found in findings)

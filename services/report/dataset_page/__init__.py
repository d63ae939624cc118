"""The page of `lorafarm dataset check`: one HTML file with thumbnails, worst first.

A check in, a written file out. It loads nothing and runs nothing; all text is escaped.
"""

from __future__ import annotations

import importlib.resources
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from captioning import (
    DATASET,
    DIRECTIONS,
    FRAMINGS,
    Finding,
    Image,
    PictureError,
    Severity,
    Store,
    upright_rgb,
    write_atomic,
)
from services.datasets.check import DatasetCheck
from services.report.pictures import WebPicture, web_picture

# A note that this share of the pictures has, and at least this many of them, is said once.
COMMON_SHARE, SOME = 0.5, 5
COPIES = ("IMG230", "IMG231", "IMG232")
SEVERITIES: tuple[Severity, ...] = ("block", "warn", "info")
SEVERITY_WORDS: dict[Severity, str] = {"block": "blocks", "warn": "warnings", "info": "notes"}
FRAMING_WORDS = {"close-up": "close-up, portrait", "upper": "upper body", "full": "full body"}
WAY_WORDS = {"front": "front", "left": "facing left", "right": "facing right", "back": "back"}


@dataclass(frozen=True)
class _Card:
    """A picture with all that was found in it and its caption."""

    image: Image
    picture: WebPicture | None
    caption: Markup
    findings: tuple[Finding, ...]
    dropped: bool  # proposed to drop

    @property
    def severity(self) -> str:
        return self.findings[0].severity if self.findings else "none"


@dataclass(frozen=True)
class _Group:
    """Copies of one picture: the one to keep first."""

    kept: _Card
    copies: tuple[tuple[_Card, Finding], ...]
    certain: bool


def build_check_page(check: DatasetCheck, store: Store, out: Path) -> Path:
    """Write the page to `out` (made whole, then renamed) and return it."""
    environment = Environment(
        loader=PackageLoader("services.report.dataset_page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    common = _common(check)
    cards = _cards(check, store, {finding.code for finding, _ in common})
    found = [card for card in cards.values() if card.findings]
    page = environment.get_template("check.html.j2").render(
        check=check,
        counts=[(one, check.count(one), SEVERITY_WORDS[one]) for one in SEVERITIES],
        about_all=[finding for finding in check.findings if finding.where == DATASET],
        common=common,
        sections=[(one, [card for card in found if card.severity == one]) for one in SEVERITIES],
        groups=_groups(check, cards),
        clean=[card for card in cards.values() if not card.findings],
        framings=[(framing, FRAMING_WORDS[framing]) for framing in FRAMINGS],
        ways=[(way, WAY_WORDS[way]) for way in DIRECTIONS],
        style=Markup(_text("services.report", "style.css") + _text(__name__, "check.css")),
    )
    write_atomic(out, page.encode())
    return out


def _text(package: str, name: str) -> str:
    return importlib.resources.files(package).joinpath(f"templates/{name}").read_text("utf-8")


def _common(check: DatasetCheck) -> list[tuple[Finding, int]]:
    """One note of each code that most pictures have, and how many have it: said once."""
    pictures: dict[str, set[str]] = defaultdict(set)
    first: dict[str, Finding] = {}
    for finding in check.findings:
        if finding.severity == "info" and finding.where != DATASET:
            pictures[finding.code].add(finding.where)
            first.setdefault(finding.code, finding)
    least = max(SOME, COMMON_SHARE * len(check.images))
    return [(first[code], len(ones)) for code, ones in pictures.items() if len(ones) >= least]


def _cards(check: DatasetCheck, store: Store, common: set[str]) -> dict[str, _Card]:
    """A card for each image, worst first, by sha256; without the findings of `common` codes."""
    found: dict[str, list[Finding]] = defaultdict(list)
    for finding in check.findings:  # worst first already
        if finding.code not in common:
            found[finding.where].append(finding)
    dropped = {decision.image for decision in check.proposed}
    cards = [
        _Card(
            image,
            _thumbnail(store, image),
            marked(check.captions.get(image.sha256, ""), found[image.sha256]),
            tuple(found[image.sha256]),
            image.sha256 in dropped,
        )
        for image in check.images
    ]
    # Within a severity those with more findings first, then in the order of intake.
    return {card.image.sha256: card for card in sorted(cards, key=lambda card: -len(card.findings))}


def _thumbnail(store: Store, image: Image) -> WebPicture | None:
    """None when the store lost the bytes: the page then says so in place of the picture."""
    try:
        return web_picture(upright_rgb(store.blobs.get(image.sha256)))
    except (OSError, PictureError, ValueError):
        return None


def _groups(check: DatasetCheck, cards: dict[str, _Card]) -> list[_Group]:
    """Certain copies first; a picture that several resemble has them in one group."""
    copies: dict[tuple[bool, str], list[Finding]] = defaultdict(list)
    for finding in check.findings:
        if finding.code in COPIES:
            copies[finding.code == "IMG232", finding.others[0]].append(finding)
    return [
        _Group(cards[kept], tuple((cards[one.where], one) for one in same), not only_alike)
        for (only_alike, kept), same in sorted(copies.items())
    ]


def marked(caption: str, findings: list[Finding]) -> Markup:
    """The caption with what findings are about marked; overlapping marks become one."""
    spans = sorted(
        (finding.start, finding.end)
        for finding in findings
        if finding.start is not None and finding.end is not None
    )
    parts, done = [], 0
    for start, end in spans:
        start, end = max(start, done), min(end, len(caption))
        if start < end:
            parts.append(
                Markup("{}<mark>{}</mark>").format(caption[done:start], caption[start:end])
            )
            done = end
    return Markup("").join([*parts, Markup("{}").format(caption[done:])])

"""Review: which captions a person should read, in which order, and how sure that makes us.

Captions and findings in, a queue and a sample out. What a person said is kept beside the
character, one row each; a caption that changed since is to be read again.
"""

from __future__ import annotations

import csv
import getpass
import hashlib
import io
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from captioning.caption_match import LOWEST_SHARE, TextEmbedder, least_alike
from captioning.captions import captioned
from captioning.character import Character, folder
from captioning.curation.observed import load_observed
from captioning.decisions import kept_images
from captioning.edits import Edit, record_edits
from captioning.errors import UserError
from captioning.findings import DATASET, Finding
from captioning.framing import framing_of
from captioning.lint import lint
from captioning.observations import ProgressCallback
from captioning.rows import read_rows, write_rows
from captioning.store import Store

REVIEWS_FILE = "reviews.jsonl"
State = Literal["open", "approved", "rejected"]
# Under this many pictures all are read: a sample of 20 % would say next to nothing.
READ_ALL_BELOW = 50
SAMPLED_ONE_IN = 5  # 20 %, the guides' spot check
CONFIDENCE = 0.95
# What a finding adds to a caption's risk: any block before all warnings, any warning before notes.
RISK = {"block": 100.0, "warn": 10.0, "info": 1.0}
UNLIKE = 5.0  # and what it adds to be among those that fit their pictures least
COLUMNS = ("picture", "risk", "why", "caption", "state", "note", "sha256", "row")


class Review(BaseModel):
    """A person's verdict about one caption; the newest about an image holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str  # sha256
    state: State
    caption: str = Field(description="The caption that was read.")
    note: str = ""
    by: str = ""


class Item(BaseModel):
    """One caption in the queue."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str  # sha256
    source: str
    caption: str
    risk: float
    why: str
    stratum: str = Field(description="Framing and risk: the sample takes from each.")
    state: State = "open"
    note: str = ""


class Queue(BaseModel):
    """All captions, the riskiest first, and which of them to read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    items: tuple[Item, ...]
    sample: tuple[str, ...] = Field(description="sha256s to read, riskiest first.")

    @property
    def read(self) -> int:
        """How many of the sample were approved or rejected."""
        chosen = set(self.sample)
        return sum(item.state != "open" for item in self.items if item.image in chosen)

    @property
    def bad(self) -> int:
        """How many of the sample were rejected."""
        chosen = set(self.sample)
        return sum(item.state == "rejected" for item in self.items if item.image in chosen)


class Conflict(BaseModel):
    """A row of a table that was not taken, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    picture: str
    reason: str


class ImportedReviews(BaseModel):
    """The result of a table: reviews and edits that were taken, and rows that were not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reviews: int
    edits: int
    conflicts: tuple[Conflict, ...]


def bad_rate_bound(total: int, read: int, bad: int = 0, confidence: float = CONFIDENCE) -> float:
    """The most bad captions, as a share of all, that `bad` of `read` still allow.

    Exact for drawing without replacement (hypergeometric): the largest number of bad ones among
    `total` under which `bad` or fewer in the sample are not rarer than 1 - `confidence`.
    """
    from scipy.stats import hypergeom  # takes most of a second, of which every command would know

    if read == 0:
        return 1.0
    counts = np.arange(bad, total - read + bad + 1)  # of bad ones among all
    allowed = counts[hypergeom.cdf(bad, total, counts, read) > 1 - confidence]
    return float(allowed.max(initial=bad)) / total


def review_queue(
    store: Store,
    character: Character,
    seed: int = 0,
    embedder: TextEmbedder | None = None,
    progress: ProgressCallback | None = None,
) -> Queue:
    """The captions of the character's kept pictures, riskiest first, with what was said of them.

    With the `embedder` of the pictures, captions that fit their pictures least are riskier.
    Raises UserError when pictures have not been captioned.
    """
    captions = captioned(store, character)
    findings = lint(captions, character)
    images = {image.sha256: image for image in kept_images(store, character.name)}
    seen = load_observed(store, list(images.values()))
    framings = {one.where: framing_of(one.accepted(), 0.0) for one in seen}
    said = load_reviews(store, character.name)
    risks = _risks(findings)
    texts = {one.image: one.caption.text for one in captions}
    unlike = least_alike(seen, texts, character, embedder, progress) if embedder else {}
    items = []
    for one in captions:
        risk, why = risks.get(one.image, (0.0, ""))
        if one.image in unlike:
            risk += UNLIKE
            told = f"among the {LOWEST_SHARE:.0%} that fit their picture least"
            why = "; ".join(filter(None, [why, f"{told} (CLIP {unlike[one.image]:.2f})"]))
        review = said.get(one.image)
        holds = review is not None and review.caption == one.caption.text
        items.append(
            Item(
                image=one.image,
                source=images[one.image].source,
                caption=one.caption.text,
                risk=risk,
                why=why,
                stratum=f"{framings[one.image]} {'risky' if risk >= RISK['warn'] else 'plain'}",
                state=review.state if review and holds else "open",
                note=review.note if review and holds else "",
            )
        )
    items.sort(key=lambda item: (-item.risk, item.source, item.image))
    return Queue(items=tuple(items), sample=tuple(draw_sample(items, seed)))


def draw_sample(items: list[Item], seed: int = 0) -> list[str]:
    """The sha256s to read: all under 50, else 20 % of every stratum, at least one, by `seed`.

    In the order of `items`; the order in which they come changes nothing about which are drawn.
    """
    if len(items) < READ_ALL_BELOW:
        return [item.image for item in items]
    strata: dict[str, list[str]] = defaultdict(list)
    for item in items:
        strata[item.stratum].append(item.image)
    drawn: set[str] = set()
    for name, members in sorted(strata.items()):
        count = -(-len(members) // SAMPLED_ONE_IN)  # rounded up, so at least one
        drawn |= set(random.Random(f"{seed} {name}").sample(sorted(members), count))
    return [item.image for item in items if item.image in drawn]


def load_reviews(store: Store, name: str) -> dict[str, Review]:
    """The review that holds for each image that has one, by sha256."""
    rows = read_rows(folder(store, name) / REVIEWS_FILE)
    return {row["image"]: Review(**row) for row in rows}


def record_reviews(store: Store, name: str, reviews: Iterable[Review]) -> None:
    """Add the reviews, signed."""
    rows = read_rows(folder(store, name) / REVIEWS_FILE)
    rows += [
        review.model_copy(update={"by": review.by or getpass.getuser()}).model_dump()
        for review in reviews
    ]
    write_rows(folder(store, name) / REVIEWS_FILE, rows)


def to_table(queue: Queue) -> bytes:
    """The sample as a CSV that spreadsheets open: UTF-8 with a mark, riskiest first."""
    chosen = set(queue.sample)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(COLUMNS)
    for item in queue.items:
        if item.image in chosen:
            row = (item.source, f"{item.risk:g}", item.why, item.caption, item.state, item.note)
            writer.writerow([*map(_shielded, row), item.image, row_hash(item)])
    return stream.getvalue().encode("utf-8-sig")


def row_hash(item: Item) -> str:
    """A hash of the row as it was exported: its caption and its review."""
    text = "\0".join((item.image, item.caption, item.state, item.note))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_table(data: bytes) -> list[dict[str, str]]:
    """The rows of such a CSV; raises UserError when it is none."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("table", "not UTF-8", "save it as CSV UTF-8") from error
    delimiter = (
        ";" if text.split("\n", 1)[0].count(";") > text.split("\n", 1)[0].count(",") else ","
    )
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    needed = {"sha256", "row", "caption", "state", "note"}
    missing = sorted(needed - set(reader.fieldnames or ()))
    if missing:
        raise UserError(
            "table",
            f"no column {', '.join(missing)}",
            "export it again and keep all of its columns",
        )
    return [{key: _bare(row.get(key) or "") for key in COLUMNS} for row in reader]


def import_table(store: Store, character: Character, data: bytes) -> ImportedReviews:
    """Take the states, notes and changed captions of an exported table.

    A row whose caption or review changed since the export is a conflict, as is an unknown one or
    one with an unknown state: it is listed and nothing of it is taken.
    """
    current = {item.image: item for item in review_queue(store, character).items}
    reviews, edits, conflicts = [], [], []
    taken: set[str] = set()
    for row in read_table(data):
        item = current.get(row["sha256"])
        reason = _conflict(row, item, row["sha256"] in taken)
        if reason or item is None:
            conflicts.append(Conflict(picture=row["picture"] or row["sha256"][:12], reason=reason))
            continue
        taken.add(item.image)
        caption, state = row["caption"].strip(), row["state"].strip().lower()
        if caption != item.caption:
            rest = _after_trigger(caption, character)
            edits.append(
                Edit(
                    image=item.image,
                    action="caption",
                    value=rest,
                    before=item.caption,
                    after=caption,
                )
            )
        if (state, row["note"], caption) != (item.state, item.note, item.caption):
            reviews.append(
                Review.model_validate(
                    {"image": item.image, "state": state, "caption": caption, "note": row["note"]}
                )
            )
    record_edits(store, character.name, edits)
    record_reviews(store, character.name, reviews)
    return ImportedReviews(reviews=len(reviews), edits=len(edits), conflicts=tuple(conflicts))


def _conflict(row: Mapping[str, str], item: Item | None, again: bool) -> str:
    """Why the row can't be taken; empty when it can."""
    if item is None:
        return "no such picture in the dataset any more"
    if again:
        return "the picture stands in the table twice"
    if row["row"] != row_hash(item):
        return "its caption or review changed since the export"
    if row["state"].strip().lower() not in ("open", "approved", "rejected"):
        return f"state {row['state']!r} is none of open, approved, rejected"
    if not row["caption"].strip():
        return "the caption is empty"
    return ""


def _after_trigger(caption: str, character: Character) -> str:
    """What an edit of a whole caption holds: all that follows the trigger."""
    rest = caption.removeprefix(character.trigger)
    return rest.lstrip(", ") if rest != caption else caption


def _risks(findings: list[Finding]) -> dict[str, tuple[float, str]]:
    """(risk, codes) of each picture that lint found something in."""
    found: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.where != DATASET:
            found[finding.where].append(finding)
    return {
        where: (
            sum(RISK[finding.severity] for finding in listed),
            "; ".join(f"{finding.code} {finding.message}" for finding in listed),
        )
        for where, listed in found.items()
    }


def _shielded(cell: str) -> str:
    """A cell that a spreadsheet would run as a formula gets an apostrophe, taken off on import."""
    return f"'{cell}" if cell[:1] in "=+-@'\t\r" and cell else cell


def _bare(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" else cell

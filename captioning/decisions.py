"""Decisions: which images stay in, and which blocking findings a person has overridden.

Kept beside the character, one row each, with who and why. Dropping takes nothing away: the image
stays in the store and comes back with the opposite decision.
"""

from __future__ import annotations

import difflib
import getpass
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field

from captioning.character import folder
from captioning.errors import UserError
from captioning.findings import Finding
from captioning.intake import Image, load_images
from captioning.rows import read_rows, write_rows
from captioning.store import Store

DECISIONS_FILE, OVERRIDES_FILE = "decisions.jsonl", "overrides.jsonl"
BY_HAND = "BYHAND"  # the code of a decision without a finding
MIN_HASH_DIGITS = 8  # of a sha256 that stands for an image
SHOWN_FINDINGS = 5  # in the error that stops freezing


class Decision(BaseModel):
    """Keep or drop one image; the newest decision about an image holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str  # sha256
    keep: bool
    code: str = Field(BY_HAND, description="The finding's code that led to it.")
    reason: str = ""
    by: str = ""


class Override(BaseModel):
    """A blocking finding that a person accepts: of one image, or of all (`where` empty)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str
    where: str = ""
    reason: str = ""
    by: str = ""


def load_decisions(store: Store, name: str) -> dict[str, Decision]:
    """The decision that holds for each image that has one, by sha256."""
    rows = read_rows(folder(store, name) / DECISIONS_FILE)
    return {row["image"]: Decision(**row) for row in rows}


def decide(store: Store, name: str, decisions: Iterable[Decision]) -> None:
    """Keep the decisions; raises UserError when one names an image that is not the character's."""
    known = {image.sha256 for image in load_images(store, name)}
    rows = read_rows(folder(store, name) / DECISIONS_FILE)
    for decision in decisions:
        if decision.image not in known:
            raise UserError(
                f"character {name}",
                f"no picture {decision.image[:12]}",
                f"`lorafarm dataset show {name}` lists its pictures",
            )
        signed = decision.model_copy(update={"by": decision.by or getpass.getuser()})
        rows.append(signed.model_dump())
    write_rows(folder(store, name) / DECISIONS_FILE, rows)


def find_image(store: Store, name: str, picture: str) -> Image:
    """The image of a source name or of the first digits (8 or more) of a sha256.

    Raises UserError, naming the nearest source, when there is none.
    """
    images = load_images(store, name)
    for image in images:
        if image.source == picture or (
            len(picture) >= MIN_HASH_DIGITS and image.sha256.startswith(picture)
        ):
            return image
    near = difflib.get_close_matches(picture, [image.source for image in images], n=1)
    raise UserError(
        f"character {name}",
        f"no picture {picture!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        f"`lorafarm dataset show {name}` lists its pictures",
    )


def kept_images(store: Store, name: str) -> list[Image]:
    """The character's images without those that were dropped."""
    decisions = load_decisions(store, name)
    return [
        image
        for image in load_images(store, name)
        if image.sha256 not in decisions or decisions[image.sha256].keep
    ]


def dropped_images(store: Store, name: str) -> list[tuple[Image, Decision]]:
    """The images that were dropped, each with the decision that did it."""
    decisions = load_decisions(store, name)
    return [
        (image, decisions[image.sha256])
        for image in load_images(store, name)
        if image.sha256 in decisions and not decisions[image.sha256].keep
    ]


def load_overrides(store: Store, name: str) -> list[Override]:
    """All overrides, oldest first."""
    return [Override(**row) for row in read_rows(folder(store, name) / OVERRIDES_FILE)]


def override(store: Store, name: str, accepted: Override) -> None:
    """Record that a person accepts a blocking finding; it is named in every version from then."""
    signed = accepted.model_copy(update={"by": accepted.by or getpass.getuser()})
    rows = [one.model_dump() for one in [*load_overrides(store, name), signed]]
    write_rows(folder(store, name) / OVERRIDES_FILE, rows)


def blocking(findings: Iterable[Finding], overrides: Iterable[Override]) -> list[Finding]:
    """The `block` findings that no override accepts."""
    accepted = {(one.code, one.where) for one in overrides}
    return [
        finding
        for finding in findings
        if finding.severity == "block"
        and not accepted & {(finding.code, ""), (finding.code, finding.where)}
    ]


def require_passable(
    store: Store, name: str, findings: Iterable[Finding], overrides: Iterable[Override]
) -> None:
    """Raise UserError naming the blocking findings, unless there is none left."""
    stops = blocking(findings, overrides)
    if not stops:
        return
    sources = {image.sha256: image.source for image in load_images(store, name)}
    listed = [
        f"{one.code} {sources.get(one.where, one.where)}: {one.message}"
        for one in stops[:SHOWN_FINDINGS]
    ]
    more = f"; and {len(stops) - SHOWN_FINDINGS} more" if len(stops) > SHOWN_FINDINGS else ""
    raise UserError(
        f"character {name}",
        f"{len(stops)} findings block it: {'; '.join(listed)}{more}",
        f"mend them (`lorafarm dataset check {name}` shows how), drop the picture with `lorafarm "
        f"dataset drop {name} <picture>`, or accept one by name with `lorafarm dataset override "
        f"{name} <code>`",
    )

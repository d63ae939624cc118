"""Human edits: what people changed in captions, one signed row each, kept beside the character.

A layer on top of what models say: rows are only ever added, and captioning again keeps them.
"""

from __future__ import annotations

import getpass
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from captioning.character import folder
from captioning.errors import UserError
from captioning.intake import load_images
from captioning.lexicon.names import plain_tag, split_weight
from captioning.rows import read_rows, write_rows
from captioning.store import Store

EDITS_FILE = "edits.jsonl"
Action = Literal["add", "remove", "leave", "prose", "caption"]


class Edit(BaseModel):
    """One change by one person to one image's caption; the newest about a thing holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str  # sha256
    action: Action = Field(
        description="add, remove: a tag. leave: the model decides about the tag again. prose, "
        "caption: this text takes the place of the model's prose, or of the whole caption after "
        "the trigger; an empty text takes it back."
    )
    value: str
    by: str = ""
    at: str = Field("", description="UTC, ISO 8601; the moment of recording when empty.")
    before: str = Field("", description="The caption before, for people to read.")
    after: str = ""

    @model_validator(mode="after")
    def _names_a_tag(self) -> Self:
        if self.action in ("add", "remove", "leave") and not plain_tag(self.value):
            raise ValueError(f"{self.action}: {self.value!r} is no tag")
        return self


@dataclass(frozen=True)
class Corrections:
    """The sum of all edits of one image; tags are in their plain spelling."""

    added: tuple[str, ...] = ()
    removed: frozenset[str] = frozenset()
    weights: dict[str, float] = field(default_factory=dict)
    prose: str | None = None
    caption: str | None = None


NONE = Corrections()


def corrections(edits: Iterable[Edit]) -> dict[str, Corrections]:
    """The sum of each image's edits, by sha256; `edits` are oldest first."""
    tags: dict[str, dict[str, Action]] = {}
    weights: dict[str, dict[str, float]] = {}
    texts: dict[tuple[str, Action], str] = {}
    for edit in edits:
        of_image = tags.setdefault(edit.image, {})
        if edit.action in ("prose", "caption"):
            texts[edit.image, edit.action] = " ".join(edit.value.split())
            continue
        name, weight = split_weight(edit.value)
        tag = plain_tag(name)
        of_image.pop(tag, None)  # so that a tag added again stands last
        if edit.action != "leave":
            of_image[tag] = edit.action
        if weight is not None:
            weights.setdefault(edit.image, {})[tag] = weight
    return {
        image: Corrections(
            added=tuple(tag for tag, action in actions.items() if action == "add"),
            removed=frozenset(tag for tag, action in actions.items() if action == "remove"),
            weights=weights.get(image, {}),
            prose=texts.get((image, "prose")) or None,
            caption=texts.get((image, "caption")) or None,
        )
        for image, actions in tags.items()
    }


def load_edits(store: Store, name: str) -> list[Edit]:
    """All edits of the character, oldest first."""
    return [Edit(**row) for row in read_rows(folder(store, name) / EDITS_FILE)]


def load_corrections(store: Store, name: str) -> dict[str, Corrections]:
    """The sum of each image's edits, by sha256, for all edits of the character."""
    return corrections(load_edits(store, name))


def record_edits(store: Store, name: str, edits: Iterable[Edit]) -> None:
    """Add the edits, signed and dated; all of them or none.

    Raises UserError when one names an image that is not the character's.
    """
    known = {image.sha256 for image in load_images(store, name)}
    rows = read_rows(folder(store, name) / EDITS_FILE)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for edit in edits:
        if edit.image not in known:
            raise UserError(
                f"character {name}",
                f"no picture {edit.image[:12]}",
                f"`lorafarm dataset show {name}` lists its pictures",
            )
        signed = {"by": edit.by or getpass.getuser(), "at": edit.at or now}
        rows.append(edit.model_copy(update=signed).model_dump())
    write_rows(folder(store, name) / EDITS_FILE, rows)

"""A character's captions: rendered from what the models said, kept beside its images.

Observations, edits and rules in, captions.jsonl out; rendering again is cheap and asks no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from captioning.character import Character, folder
from captioning.decisions import kept_images
from captioning.edits import load_corrections
from captioning.errors import UserError
from captioning.findings import Finding
from captioning.intake import Image
from captioning.lint import Captioned, lint
from captioning.observations import Kind, Observation, load_observations
from captioning.render import Caption, render_all
from captioning.render_tags import Seen
from captioning.rows import read_rows, write_rows
from captioning.rules import Form
from captioning.store import Store

CHARACTER = 4  # the category of names of known characters in a WD tagger's selected_tags.csv
CAPTIONS_FILE = "captions.jsonl"
# The observations that each form of caption is made of.
_NEEDED: dict[Form, tuple[Kind, ...]] = {
    "tags": ("tags",),
    "prose": ("prose",),
    "tags+prose": ("tags", "prose"),
    "prose+tags": ("prose", "tags"),
    "four-part": ("tags",),
}


@dataclass(frozen=True)
class CaptionChange:
    """How one image's caption changed since it was kept last."""

    image: str  # sha256
    before: str
    after: str
    came: tuple[str, ...]  # parts between commas
    went: tuple[str, ...]
    moot: tuple[str, ...]  # tags that people added or removed, and the model now agrees with them


def caption_all(store: Store, character: Character) -> dict[str, str]:
    """Render and keep the caption of every image of the character that was not dropped.

    Gives them by sha256. The newest observation of a kind counts. Raises UserError when what the
    rules need was not observed for a picture.
    """
    captions = rendered_captions(store, character)
    keep_captions(store, character, captions)
    return {sha256: caption.text for sha256, caption in captions.items()}


def rendered_captions(store: Store, character: Character) -> dict[str, Caption]:
    """What `caption_all` keeps, with all that was done to get it; writes nothing."""
    return render_all(
        load_seen(store, character), character, load_corrections(store, character.name)
    )


def load_seen(store: Store, character: Character) -> dict[str, Seen]:
    """What the models said about each image that was not dropped, by sha256.

    Raises UserError when what the rules need was not observed for a picture.
    """
    return {image.sha256: _seen(store, character, image) for image in _kept(store, character)}


def captioned(store: Store, character: Character) -> list[Captioned]:
    """Each image's caption beside what the models said, as lint takes them; writes nothing."""
    pictures = load_seen(store, character)
    captions = render_all(pictures, character, load_corrections(store, character.name))
    return [Captioned(sha256, captions[sha256], seen) for sha256, seen in pictures.items()]


def caption_findings(store: Store, character: Character) -> list[Finding]:
    """What lint says of the captions that captioning would give now, worst first.

    Freezing asks `require_passable` about them.
    """
    return lint(captioned(store, character), character)


def keep_captions(store: Store, character: Character, captions: dict[str, Caption]) -> None:
    """Write captions.jsonl, in the order of intake."""
    rows: list[dict[str, Any]] = [
        {
            "sha256": image.sha256,
            "source": image.source,
            "caption": captions[image.sha256].text,
            "lost": list(captions[image.sha256].lost),
        }
        for image in _kept(store, character)
    ]
    write_rows(folder(store, character.name) / CAPTIONS_FILE, rows)


def load_captions(store: Store, name: str) -> dict[str, str]:
    """The captions kept last, by sha256; empty when none were rendered yet."""
    rows = read_rows(folder(store, name) / CAPTIONS_FILE)
    return {row["sha256"]: row["caption"] for row in rows}


def caption_changes(store: Store, character: Character) -> list[CaptionChange]:
    """What captioning now would change, image by image: after another model, rules or edits.

    Writes nothing. Images that have no kept caption yet are left out.
    """
    kept, human = load_captions(store, character.name), load_corrections(store, character.name)
    pictures = load_seen(store, character)
    now = render_all(pictures, character, human)
    untouched = render_all(pictures, character, {})
    changes = []
    for sha256, caption in now.items():
        before = kept.get(sha256)
        if before is None or before == caption.text:
            continue
        old, new = before.split(", "), caption.text.split(", ")
        model = set(untouched[sha256].tags)
        mine = human.get(sha256)
        moot = [tag for tag in mine.added if tag in model] if mine else []
        moot += sorted(tag for tag in mine.removed if tag not in model) if mine else []
        changes.append(
            CaptionChange(
                sha256,
                before,
                caption.text,
                came=tuple(part for part in new if part not in old),
                went=tuple(part for part in old if part not in new),
                moot=tuple(moot),
            )
        )
    return changes


def _kept(store: Store, character: Character) -> list[Image]:
    return kept_images(store, character.name)


def _seen(store: Store, character: Character, image: Image) -> Seen:
    tags: dict[str, float] | None = None
    prose: str | None = None
    tagger, characters = "", frozenset[str]()
    for said in load_observations(store, image.sha256):
        if said.tags is not None:
            tags, tagger = said.tags, said.model
            characters = _character_names(said)
        if said.prose is not None:
            prose = said.prose
    seen_kinds = {"tags": tags is not None, "prose": prose is not None}
    lacking = [kind for kind in _NEEDED[character.rules.form] if not seen_kinds[kind]]
    if lacking:
        raise UserError(
            f"character {character.name}",
            f"no {' and no '.join(lacking)} for {image.source} yet",
            f"run `lorafarm dataset caption {character.name}`",
        )
    return Seen(tags or {}, prose or "", tagger, characters)


def _character_names(said: Observation) -> frozenset[str]:
    """Those of its tags that name a known character, if the tagger says which they are."""
    categories = said.categories or {}
    return frozenset(tag for tag, category in categories.items() if category == CHARACTER)

"""Captions changed by people: one picture's caption edited, imported captions put to use.

Every change is recorded as a signed edit, which captioning again keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from captioning import (
    Character,
    Edit,
    Image,
    Store,
    UserError,
    caption_all,
    corrections,
    find_image,
    load_captions,
    load_character,
    load_edits,
    load_images,
    load_seen,
    record_edits,
    render_all,
    use_imported,
)
from services.farm.settings import Home


@dataclass(frozen=True)
class EditedCaption:
    """One picture's caption before and after an edit."""

    image: Image
    before: str  # empty when the picture had no caption yet
    after: str


@dataclass(frozen=True)
class UsedCaptions:
    """Captions that came with the pictures and are used now."""

    edits: tuple[Edit, ...]  # one for each picture
    sources: dict[str, str]  # the name of every picture by sha256
    rendered: bool  # the captions were rendered again; False before captioning


def edit_caption(
    home: Home, name: str, picture: str, changes: Sequence[tuple[str, str]]
) -> EditedCaption:
    """Record changes (action, value) of one picture's caption and render it again.

    The actions are those of `captioning.Edit`. Raises UserError, with nothing recorded, when there
    is no change, no such picture, the picture is dropped, or a value is no tag.
    """
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
    return EditedCaption(image, before, after)


def use_captions(home: Home, name: str) -> UsedCaptions:
    """Make the captions that came with the pictures the captions used, as edits."""
    store = home.store
    edits = use_imported(store, name)
    rendered = bool(edits and load_captions(store, name))
    if rendered:
        caption_all(store, load_character(store, name))
    sources = {image.sha256: image.source for image in load_images(store, name)}
    return UsedCaptions(tuple(edits), sources, rendered)


def _edits(sha256: str, changes: Sequence[tuple[str, str]], before: str) -> list[Edit]:
    edits = []
    for action, value in changes:
        row = {"image": sha256, "action": action, "value": value, "before": before}
        try:
            edits.append(Edit.model_validate(row))
        except ValueError as error:
            raise UserError("edit", f"{value!r} is no tag", "write a word or two") from error
    return edits


def _rendered_with(store: Store, character: Character, sha256: str, edits: list[Edit]) -> str:
    """The caption as it will be, before anything is written."""
    pictures = load_seen(store, character)
    if sha256 not in pictures:
        raise UserError("edit", "the picture is dropped", "take it back in with `dataset keep`")
    human = corrections([*load_edits(store, character.name), *edits])
    return render_all(pictures, character, human)[sha256].text

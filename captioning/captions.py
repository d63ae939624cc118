"""A character's captions: rendered from what the models said, kept beside its images.

Observations and rules in, captions.jsonl out; rendering again after a change of rules is cheap.
"""

from __future__ import annotations

from captioning.character import Character, folder
from captioning.decisions import kept_images
from captioning.errors import UserError
from captioning.observations import Kind, load_observations
from captioning.rows import read_rows, write_rows
from captioning.rules import intrinsic_tags, render
from captioning.store import Store

CAPTIONS_FILE = "captions.jsonl"
# What each form of caption is made of.
_NEEDED: dict[str, tuple[Kind, ...]] = {
    "tags": ("tags",),
    "prose": ("prose",),
    "tags+prose": ("tags", "prose"),
}


def caption_all(store: Store, character: Character) -> dict[str, str]:
    """Render and keep the caption of every image of the character that was not dropped.

    Gives them by sha256. The newest observation of a kind counts. Raises UserError when what the
    rules need was not observed for a picture.
    """
    images = kept_images(store, character.name)
    tags: dict[str, dict[str, float]] = {}
    prose: dict[str, str] = {}
    for image in images:
        for seen in load_observations(store, image.sha256):
            if seen.tags is not None:
                tags[image.sha256] = seen.tags
            if seen.prose is not None:
                prose[image.sha256] = seen.prose
        seen_kinds = {"tags": image.sha256 in tags, "prose": image.sha256 in prose}
        lacking = [kind for kind in _NEEDED[character.rules.form] if not seen_kinds[kind]]
        if lacking:
            raise UserError(
                f"character {character.name}",
                f"no {' and no '.join(lacking)} for {image.source} yet",
                f"run `lorafarm dataset caption {character.name}`",
            )
    intrinsic = intrinsic_tags(tags.values(), character.rules)
    captions = {
        image.sha256: render(
            character.trigger,
            character.class_word,
            tags.get(image.sha256, {}),
            prose.get(image.sha256, ""),
            intrinsic,
            character.rules,
        )
        for image in images
    }
    rows = [
        {"sha256": image.sha256, "source": image.source, "caption": captions[image.sha256]}
        for image in images
    ]
    write_rows(folder(store, character.name) / CAPTIONS_FILE, rows)
    return captions


def load_captions(store: Store, name: str) -> dict[str, str]:
    """The captions kept last, by sha256; empty when none were rendered yet."""
    rows = read_rows(folder(store, name) / CAPTIONS_FILE)
    return {row["sha256"]: row["caption"] for row in rows}

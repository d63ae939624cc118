"""What a caption says something about: its four parts, and what is not the character."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from captioning.findings import Finding
from captioning.lexicon import PARTS, Group, lexicon
from captioning.lint.subject import WORD, Captioned, finding
from captioning.render_tags import Ready

# What is not the character has to be said, or the trigger learns it.
SLOTS = ("outfit", "expression", "background")
# Ranks of the body on which an outfit is; a picture that shows none of them needs none.
_DRESSED = {"legs", "hips", "torso"}
_FACE_HIDDEN = {"from behind", "head out of frame", "headless", "facing away"}


def check(one: Captioned, ready: Ready) -> Iterator[Finding]:
    """CAP141 and CAP142."""
    groups = [ready.lexicon.group(tag) for tag in one.caption.tags]
    groups += _in_prose(one.caption.prose)
    parts = {group.part for group in groups}
    if ready.class_word in one.caption.text.lower():
        parts.add("subject")
    for part in PARTS:
        if part not in parts:
            yield finding("CAP141", one.image, f"it says nothing on {part}", None, part)
    slots = {group.slot for group in groups}
    for slot in SLOTS:
        if slot not in slots and _can_be_seen(slot, one, ready):
            yield finding("CAP142", one.image, f"it says nothing on the {slot}", None, slot)


def _can_be_seen(slot: str, one: Captioned, ready: Ready) -> bool:
    """By what the tagger says of the framing, and the caption itself."""
    lowest = ready.rules.threshold_of(one.seen.tagger)
    tags = {ready.cached_name(tag): 1.0 for tag, score in one.seen.tags.items() if score >= lowest}
    tags |= dict.fromkeys(one.caption.tags, 1.0)
    if slot == "outfit":
        shown = ready.lexicon.shown_ranks(tags)
        return shown is None or bool(shown & _DRESSED)
    return slot != "expression" or not _FACE_HIDDEN & tags.keys()


def _in_prose(prose: str) -> list[Group]:
    """The groups whose words a sentence uses, whatever their endings."""
    known = _stems()
    stems = {_stem(word.lower()) for word in WORD.findall(prose)}
    return [known[stem] for stem in stems if stem in known]


@cache
def _stems() -> dict[str, Group]:
    """Single words of the lexicon, without their endings, and their groups."""
    groups = lexicon().groups
    found = {
        _stem(word): group
        for group in groups
        for word in (*group.tags, *group.ends)
        if " " not in word
    }
    outfit = next(group for group in groups if group.group == "torso")
    return found | dict.fromkeys((_stem("wearing"), _stem("dressed"), _stem("outfit")), outfit)


def _stem(word: str) -> str:
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word

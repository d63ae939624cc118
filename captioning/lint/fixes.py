"""Mechanical fixes: findings in, human edits out. What needs a look at the picture gets none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from captioning.character import Character
from captioning.edits import Edit
from captioning.findings import Finding
from captioning.lexicon.names import plain_tag, without_weights
from captioning.lint.subject import Captioned, place_of
from captioning.render_tags import Ready

FIXABLE = {"CAP101", "CAP102", "CAP103", "CAP114", "CAP115", "CAP121", "CAP123", "CAP124"}
FIXABLE |= {"CAP131", "CAP132", "CAP133", "CAP134", "CAP135", "CAP151"}


def fixes(
    findings: Iterable[Finding], captions: Sequence[Captioned], character: Character
) -> list[Edit]:
    """The edits that mend what can be mended without looking; nothing is written.

    Rendering again with them, and linting that, shows what is left.
    """
    ready = Ready(character)
    by_image = {one.image: one for one in captions}
    texts = {image: one.caption.text for image, one in by_image.items()}
    edits: list[Edit] = []
    for found in findings:
        if found.code not in FIXABLE:
            continue
        for image in found.others if found.code == "CAP151" else (found.where,):
            one = by_image[image]
            remove, add = _change(found, one, ready)
            if one.caption.by_hand:
                texts[image] = _rewritten(found, texts[image], remove, add, ready)
            else:
                edits += [Edit(image=image, action="remove", value=tag) for tag in remove]
                edits += [Edit(image=image, action="add", value=tag) for tag in add]
    for image, text in texts.items():
        one = by_image[image]
        if text != one.caption.text:
            before = one.caption.text
            edits.append(Edit(image=image, action="caption", value=text, before=before))
    return list(dict.fromkeys(edits))


def _change(found: Finding, one: Captioned, ready: Ready) -> tuple[list[str], list[str]]:
    """(tags to remove, tags to add)."""
    value, limit = str(found.value), str(found.limit)
    tags = one.caption.tags
    if found.code in ("CAP121", "CAP103"):
        word = plain_tag(value)
        hit = [tag for tag in tags if place_of(word, tag)]
        left = [
            " ".join(part for part in tag.split(" ") if part not in word.split()) for tag in hit
        ]
        return hit, [tag for tag in left if tag]
    if found.code in ("CAP123", "CAP124"):
        return [value], [limit]
    if found.code in ("CAP134", "CAP135", "CAP151"):
        return ([value] if value in tags else []), []
    if found.code == "CAP131":
        return [], [limit]
    if found.code == "CAP133":
        rule = ready.replace[int(float(limit)) - 1]
        return [tag for tag in tags if tag in rule.remove], [t for t in rule.add if t not in tags]
    return [], []


def _rewritten(
    found: Finding, text: str, remove: Sequence[str], add: Sequence[str], ready: Ready
) -> str:
    """A whole caption, mended; rendering puts the trigger first and joins the lines."""
    trigger = ready.character.trigger
    if found.code == "CAP114":
        return without_weights(text)
    if found.code in ("CAP101", "CAP102", "CAP115"):
        body = ready.trigger.sub(" ", " ".join(text.split()))
        parts = [" ".join(part.split()) for part in body.split(",")]
        return ", ".join([trigger, *(part for part in parts if part)])
    if found.code in ("CAP103", "CAP121"):
        place = place_of(str(found.value), text)
        cut = text if place is None else text[: place[0]] + text[place[1] :]
        return _tidy(cut)
    parts = [part.strip() for part in text.split(",")]
    if found.code == "CAP132":
        return ", ".join(_sorted(parts, ready))
    swaps: Mapping[str, str] = {}
    if found.code in ("CAP123", "CAP124"):
        swaps, add = {remove[0]: add[0]}, []
    kept = [swaps.get(plain_tag(part), part) for part in parts]
    kept = [part for part in kept if part in swaps.values() or plain_tag(part) not in remove]
    if found.code == "CAP131":
        return ", ".join([*kept[:1], *add, *kept[1:]])
    return ", ".join([*kept, *add])


def _sorted(parts: list[str], ready: Ready) -> list[str]:
    """The parts after trigger, class word and fixed tags in body order."""
    head = {ready.character.trigger.lower(), ready.class_word} | ready.fixed_tags
    first = [part for part in parts if plain_tag(part) in head]
    rest = [part for part in parts if plain_tag(part) not in head]
    ranked = sorted(rest, key=lambda part: ready.ranks[ready.lexicon.group(plain_tag(part)).rank])
    return [*first, *ranked]


def _tidy(text: str) -> str:
    parts = (" ".join(part.split()) for part in text.split(","))
    return ", ".join(part for part in parts if part)

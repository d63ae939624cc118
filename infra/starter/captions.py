"""An avatar's facts as tags and as prose. The words are those of `styles.py` and nothing else."""

from __future__ import annotations

import random

from avatars import Avatar
from styles import STYLE_WORDS

CLASS_WORD = "person"
# Chance that a training caption leaves out a fact, so that short prompts work as well.
DROP_PROBABILITY = 0.15


def tags(avatar: Avatar) -> list[str]:
    """Every fact as a tag, the class word first."""
    found = [CLASS_WORD, STYLE_WORDS[avatar.style], avatar.hair]
    if avatar.hair_colour:
        found.append(f"{avatar.hair_colour} hair")
    found.append(f"{avatar.skin} skin")
    found += [avatar.mouth, avatar.eyes]
    if avatar.clothing:
        found.append(f"{avatar.clothing_colour} {avatar.clothing}")
    found += [*avatar.extras, avatar.framing, f"{avatar.background} background"]
    return [tag for tag in found if tag]


def tag_caption(avatar: Avatar, rng: random.Random | None = None) -> str:
    """Tags joined by commas; with `rng` in random order and with some left out."""
    found = tags(avatar)
    if rng is None:
        return ", ".join(found)
    rest = [tag for tag in found[1:] if rng.random() >= DROP_PROBABILITY]
    rng.shuffle(rest)
    return ", ".join([CLASS_WORD, *rest])


MOUTH_PROSE = {
    "smile": "smiling", "laughing": "laughing", "sad": "looking sad", "angry": "looking angry",
    "open mouth": "with an open mouth",
}  # fmt: skip
EYES_PROSE = {"closed eyes": "with closed eyes", "wink": "winking"}
FRAMING_PROSE = {"close-up": "a close-up", "portrait": "a portrait", "far view": "a far view"}
BARE_HEADS = {"bald": "a bald head", "turban": "a turban", "hat": "a hat", "hijab": "a hijab"}


def prose(avatar: Avatar, rng: random.Random | None = None) -> str:
    """One sentence; with `rng` some facts are left out."""

    def kept() -> bool:
        return rng is None or rng.random() >= DROP_PROBABILITY

    if avatar.hair in BARE_HEADS:
        head = BARE_HEADS[avatar.hair]
    elif avatar.hair in ("afro", "mohawk", "bun", "ponytail"):
        head = f"a {avatar.hair_colour} {avatar.hair}"
    else:
        length = avatar.hair.removesuffix(" hair")
        head = f"{length} {avatar.hair_colour} hair"
    text = f"{FRAMING_PROSE[avatar.framing]} of a {CLASS_WORD} with {head}"
    if kept():
        text += f" and {avatar.skin} skin"
    if avatar.clothing and kept():
        article = "an" if avatar.clothing_colour[0] in "aeiou" else "a"
        text += f", wearing {article} {avatar.clothing_colour} {avatar.clothing}"
    parts = [MOUTH_PROSE.get(avatar.mouth, ""), EYES_PROSE.get(avatar.eyes, "")]
    if avatar.extras:
        parts.append("with " + " and ".join(_with_article(word) for word in avatar.extras))
    text += "".join(f", {part}" for part in parts if part and kept())
    if kept():
        article = "an" if avatar.background[0] in "aeiou" else "a"
        text += f", on {article} {avatar.background} background"
    if kept():
        text += f", {STYLE_WORDS[avatar.style]}"
    return text


def _with_article(word: str) -> str:
    return f"a {word}" if word in ("beard", "mustache", "face mask") else word


def training_caption(avatar: Avatar, rng: random.Random) -> str:
    """Half tags, half prose: both are what captioning models give."""
    return tag_caption(avatar, rng) if rng.random() < 0.5 else prose(avatar, rng)

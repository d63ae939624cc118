"""The one spelling of a tag: lower case, spaces, no commas; and emphasis taken apart from it."""

from __future__ import annotations

import re
from functools import lru_cache

KNOWN_NAMES = 200_000  # spellings kept in memory
# In these the underscore is drawn, not a space (the list of kohya's tagger script).
_KAOMOJI = {"0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3"}
_KAOMOJI |= {"6_9", ">_o", "@_@", "^_^", "o_o", "u_u", "x_x", "|_|", "||_||"}
# `(red eyes:1.3)`, any number of brackets; no comma or bracket inside.
WEIGHTED = re.compile(r"\(+([^(),:]*[^(),:\s][^(),:]*):(\d+(?:\.\d+)?|\.\d+)\)+")


@lru_cache(KNOWN_NAMES)
def plain_tag(tag: str) -> str:
    """One line in lower case with single spaces and without commas; may come out empty."""
    tag = "".join(letter if letter.isprintable() and letter != "," else " " for letter in tag)
    tag = " ".join(tag.lower().split())
    return tag if tag in _KAOMOJI else " ".join(tag.replace("_", " ").split())


def split_weight(tag: str) -> tuple[str, float | None]:
    """(`red eyes`, 1.3) of `(red eyes:1.3)`; None for a tag without emphasis."""
    found = WEIGHTED.fullmatch(tag.strip())
    return (found[1], float(found[2])) if found else (tag, None)


def without_weights(text: str) -> str:
    """The text with every `(words:1.3)` written as `words`."""
    return WEIGHTED.sub(lambda found: found[1], text)

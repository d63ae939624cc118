"""Which group of attributes a tag belongs to, so that a measure can be told apart by group."""

from __future__ import annotations

from styles import EXTRAS, EYES, FRAMING, HAIR, MOUTHS, SKIN, STYLE_WORDS

EXPRESSIONS = {word for words in (MOUTHS, EYES) for style in words.values() for word in style}
_COLOURED_HAIR = {f"{colour} hair" for colour in HAIR}
_SKINS = {f"{colour} skin" for colour in SKIN}
# In the order in which they are shown.
GROUPS = (
    "background",
    "framing",
    "style",
    "skin",
    "hair colour",
    "hair shape",
    "clothing",
    "worn or grown",
    "expression",
)


def group(tag: str) -> str:
    """The group of a tag of `captions.tags` (the class word has none and is not asked for)."""
    if tag.endswith(" background"):
        return "background"
    if tag in FRAMING:
        return "framing"
    if tag in STYLE_WORDS.values():
        return "style"
    if tag in _SKINS:
        return "skin"
    if tag in _COLOURED_HAIR:
        return "hair colour"
    if tag.endswith("shirt"):
        return "clothing"
    if tag in EXTRAS:
        return "worn or grown"
    return "expression" if tag in EXPRESSIONS else "hair shape"

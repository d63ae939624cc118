"""Framing and direction of the subject, read from a picture's tags.

Tag scores in, one word or None out. With a tagger that knows none of these tags the
answer is None, which means "not observable" and not "no".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

Framing = Literal["close-up", "upper", "full"]
Direction = Literal["front", "left", "right", "back"]

FRAMINGS: tuple[Framing, ...] = ("close-up", "upper", "full")
DIRECTIONS: tuple[Direction, ...] = ("front", "left", "right", "back")
Word = TypeVar("Word", bound=str)

# The default threshold for general tags in kohya's tagger script and most tools after it.
ACCEPTED = 0.35

# These are Danbooru's own definitions: `portrait` is head and shoulders, `upper body` ends at the
# navel, `cowboy shot` at the thighs. `far view` is the shipped starter tagger's word.
_FRAMINGS: dict[str, Framing] = {
    "close-up": "close-up",
    "close up": "close-up",
    "face focus": "close-up",
    "headshot": "close-up",
    "portrait": "close-up",
    "cropped torso": "upper",
    "upper body": "upper",
    "half body": "upper",
    "waist up": "upper",
    "cowboy shot": "upper",
    "medium shot": "upper",
    "full body": "full",
    "full shot": "full",
    "wide shot": "full",
    "very wide shot": "full",
    "far view": "full",
}
# Which way the body or head is turned, as it lies in the picture: `left` looks to its left edge.
_VIEWS: dict[str, Direction] = {
    "front view": "front",
    "from front": "front",
    "straight-on": "front",
    "facing viewer": "front",
    "facing left": "left",
    "profile left": "left",
    "left profile": "left",
    "facing right": "right",
    "profile right": "right",
    "right profile": "right",
    "from behind": "back",
    "back view": "back",
    "facing away": "back",
}
# From one side, but Danbooru does not say which.
_SIDES = {"from side", "side view", "profile", "facing to the side"}
# Where the eyes go: a weaker sign, asked only when no tag tells the view. `looking back` is a
# person seen from behind.
_GAZES: dict[str, Direction] = {
    "looking at viewer": "front",
    "looking left": "left",
    "looking to the left": "left",
    "looking right": "right",
    "looking to the right": "right",
    "looking back": "back",
}


def framing_of(tags: Mapping[str, float], threshold: float = ACCEPTED) -> Framing | None:
    """How much of the subject is in the picture, by the accepted framing tag of the best score.

    `tags` are scores of 0 to 1 by name, with spaces or underscores. On equal scores the closer
    framing wins. None when no framing tag is accepted.
    """
    scores = _best(tags, threshold, _FRAMINGS)
    return _first_best(FRAMINGS, scores)


def direction_of(tags: Mapping[str, float], threshold: float = ACCEPTED) -> Direction | None:
    """Which way the subject is turned, signed: `left` faces the picture's left edge.

    Tags of the view win over tags of the gaze; on equal scores the earlier of `DIRECTIONS` does.
    None when no tag tells, and for a side view that no tag signs (see `side_unsigned`).
    """
    views = _best(tags, threshold, _VIEWS)
    side = _side_score(tags, threshold)
    if side > max(views.values(), default=0.0):
        signed = views | _best(tags, threshold, _GAZES)
        left, right = signed.get("left", 0.0), signed.get("right", 0.0)
        if left == right:
            return None
        return "left" if left > right else "right"
    scores = views or _best(tags, threshold, _GAZES)
    return _first_best(DIRECTIONS, scores)


def side_unsigned(tags: Mapping[str, float], threshold: float = ACCEPTED) -> bool:
    """Whether the tags tell a side view and not which side."""
    return _side_score(tags, threshold) > 0 and direction_of(tags, threshold) is None


def _best(
    tags: Mapping[str, float], threshold: float, meanings: Mapping[str, Word]
) -> dict[Word, float]:
    """The best score of each meaning among the accepted tags."""
    found: dict[Word, float] = {}
    for tag, score in tags.items():
        meaning = meanings.get(_plain(tag))
        if meaning is not None and score >= threshold:
            found[meaning] = max(found.get(meaning, 0.0), score)
    return found


def _first_best(order: tuple[Word, ...], scores: Mapping[Word, float]) -> Word | None:
    """The word of the best score, the earlier in `order` when they are equal."""
    return min(scores, key=lambda word: (-scores[word], order.index(word)), default=None)


def _side_score(tags: Mapping[str, float], threshold: float) -> float:
    scores = (score for tag, score in tags.items() if _plain(tag) in _SIDES)
    return max((score for score in scores if score >= threshold), default=0.0)


def _plain(tag: str) -> str:
    return tag.replace("_", " ").casefold().strip()

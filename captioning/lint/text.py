"""The text as a whole: length, line breaks, alphabet, emphasis, emptiness."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import lru_cache

from captioning.findings import Finding
from captioning.lexicon.names import WEIGHTED
from captioning.lint.subject import Captioned, finding
from captioning.render_tags import Ready

SHOWN_WORDS = 8  # of what was lost


def check(one: Captioned, ready: Ready) -> Iterator[Finding]:
    """CAP111 to CAP117."""
    caption, text = one.caption, one.caption.text
    if caption.lost:
        more = f" and {len(caption.lost) - SHOWN_WORDS} more" * (len(caption.lost) > SHOWN_WORDS)
        message = f"the encoder would not read: {', '.join(caption.lost[:SHOWN_WORDS])}{more}"
        lost = len(caption.lost)
        yield finding("CAP111", one.image, message, lost, caption.limit)
    if caption.tokens > caption.limit:
        message = f"{caption.tokens} tokens, of which the last {caption.tokens - caption.limit} are"
        message += " not read"
        yield finding("CAP112", one.image, message, caption.tokens, caption.limit)
    foreign = [
        (place, letter)
        for place, letter in enumerate(text)
        if not letter.isascii() and not _latin(letter)
    ]
    if foreign:
        letters = "".join(letter for _, letter in foreign)
        start = foreign[0][0]
        end = start + next(
            (step for step, (place, _) in enumerate(foreign) if place != start + step), len(foreign)
        )
        message = f"{len(foreign)} letters that are not Latin: {letters[:20]}"
        yield finding("CAP113", one.image, message, letters[:20], None, (start, end))
    if not ready.rules.weight_syntax and (weighted := WEIGHTED.search(text)):
        message = f"{weighted[0]!r} is learnt as words and numbers"
        yield finding("CAP114", one.image, message, weighted[0], None, weighted.span())
    if text and text.splitlines() != [text]:
        breaks = [place for place, letter in enumerate(text) if letter.splitlines() == [""]]
        message = f"{len(breaks) + 1} lines; most trainers read the first only"
        yield finding("CAP115", one.image, message, len(breaks) + 1, 1, (breaks[0], breaks[0] + 1))
    yield from _empty(one, ready)


def _empty(one: Captioned, ready: Ready) -> Iterator[Finding]:
    caption = one.caption
    wants_prose = ready.rules.form not in ("tags", "four-part") and not caption.by_hand
    if not caption.text.strip():
        yield finding("CAP116", one.image, "there is no text at all")
    elif wants_prose and not caption.prose:
        yield finding("CAP116", one.image, "there is no prose", None, ready.rules.form)
    elif not caption.tags and not caption.prose:
        yield finding("CAP117", one.image, f"it only says {caption.text!r}", caption.text)


@lru_cache(10_000)
def _latin(letter: str) -> bool:
    """Whether it is no letter, or one of the Latin alphabet."""
    return not letter.isalpha() or unicodedata.name(letter, "").startswith("LATIN ")

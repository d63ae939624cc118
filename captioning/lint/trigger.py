"""The trigger: first, once, spelt right, and a word that stands for nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from captioning.findings import DATASET, Finding
from captioning.lint.subject import WORD, Captioned, finding
from captioning.render_tags import Ready

# How many letters may be wrong for a word to be taken for the trigger: two, as the guides have it;
# in a short trigger that would hit half of the language.
NEAR_MISS = {4: 1, 5: 1}
NEAR_MISS_LONG, SHORTEST = 2, 4


def known_words(captions: Sequence[Captioned], ready: Ready) -> frozenset[str]:
    """Words that are nobody's misspelt trigger: of the class word, the lexicon and the taggers."""
    lexicon = ready.lexicon
    sources: list[Iterable[str]] = [ready.class_word.split(), lexicon.words.common, lexicon.colours]
    for group in lexicon.groups:
        sources.append(group.tags)
        sources.append(group.ends)
    sources += [one.seen.tags for one in captions]
    return frozenset(word for source in sources for tag in source for word in tag.lower().split())


def check(one: Captioned, ready: Ready, known: frozenset[str]) -> Iterator[Finding]:
    """CAP101 to CAP103."""
    text, trigger = one.caption.text, ready.character.trigger
    places = [found.span() for found in ready.trigger.finditer(text)]
    exact = [place for place in places if text[slice(*place)] == trigger]
    first = text.split(",", 1)[0].strip()
    if first != trigger:
        message = f"it begins with {first[:40]!r}, not with {trigger!r}"
        place = (0, len(first)) if first else None
        yield finding("CAP101", one.image, message, first, trigger, place)
    if len(exact) > 1:
        message = f"{trigger!r} stands there {len(exact)} times"
        yield finding("CAP102", one.image, message, len(exact), 1, exact[1])
    allowed, lower_trigger = 0, trigger.lower()
    if len(trigger) >= SHORTEST:
        allowed = NEAR_MISS.get(len(trigger), NEAR_MISS_LONG)
    for word in WORD.finditer(text):
        written = word[0].removesuffix("'s")
        lower = written.lower()
        if lower in known or distance(lower, lower_trigger, allowed) > allowed:
            continue
        if not any(start <= word.start() and word.end() <= end for start, end in exact):
            message = f"{written!r} looks like the trigger {trigger!r}"
            yield finding("CAP103", one.image, message, written, trigger, word.span())


def check_trigger(ready: Ready) -> Iterator[Finding]:
    """CAP104, once for the dataset."""
    trigger = ready.character.trigger
    if trigger.lower() in ready.lexicon.words.common or ready.lexicon.knows(trigger.lower()):
        message = f"{trigger!r} is a word that the base model knows as something else"
    elif any(letter.isdigit() for letter in trigger):
        message = f"{trigger!r} has digits, which encoders read as tokens of their own"
    else:
        return
    yield finding("CAP104", DATASET, message, trigger)


@lru_cache(100_000)
def distance(one: str, other: str, most: int) -> int:
    """Letters to add, drop or change between two words (Levenshtein); `most` + 1 for any more."""
    if abs(len(one) - len(other)) > most:
        return most + 1
    row = list(range(len(other) + 1))
    for place, letter in enumerate(one, 1):
        last, row[0] = row[0], place
        for column, wanted in enumerate(other, 1):
            last, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, last + (letter != wanted)),
            )
        if min(row) > most:
            return most + 1
    return min(row[-1], most + 1)

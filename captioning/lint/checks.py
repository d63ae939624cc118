"""lint(): all checks, one caption after the other, then those of the whole set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from captioning.character import Character
from captioning.findings import Finding, worst_first
from captioning.lint import prose, sets, slots, tags, text, trigger, words
from captioning.lint.subject import Captioned
from captioning.render_tags import Ready


def lint(captions: Sequence[Captioned], character: Character) -> list[Finding]:
    """Everything that is wrong with the captions of one set, worst first.

    Pure, and independent of the captions' order.
    """
    ready = Ready(character)
    seen = trigger.known_words(captions, ready)
    found = list(_each(captions, ready, seen))
    found += trigger.check_trigger(ready)
    found += sets.check_set(captions, ready)
    found += tags.check_unseen_fixed(captions, ready)
    return worst_first(found)


def _each(captions: Iterable[Captioned], ready: Ready, known: frozenset[str]) -> Iterator[Finding]:
    for one in captions:
        yield from trigger.check(one, ready, known)
        yield from text.check(one, ready)
        yield from words.check(one, ready)
        yield from prose.check(one, ready)
        yield from tags.check(one, ready)
        yield from slots.check(one, ready)

"""Single words: adjectives that show nothing, guesses, other names for the same thing."""

from __future__ import annotations

from collections.abc import Iterator

from captioning.findings import Finding
from captioning.lexicon.names import plain_tag
from captioning.lint.subject import WORD, Captioned, finding, place_of
from captioning.render_tags import Ready


def check(one: Captioned, ready: Ready) -> Iterator[Finding]:
    """CAP121 to CAP123."""
    text = one.caption.text
    lower_text = text.lower()
    exempt = {word for tag in one.caption.fixed for word in tag.split()}
    exempt |= {ready.character.trigger.lower(), *ready.class_word.split()}
    for word in WORD.finditer(text):
        lower = word[0].lower()
        if lower not in exempt and _stem(lower, ready):
            message = f"{word[0]!r} shows nothing that a model could learn"
            yield finding("CAP121", one.image, message, word[0], None, word.span())
    for words in sorted(ready.lexicon.words.subjective_tags):
        place = place_of(words, text) if words in lower_text else None
        if place and words not in one.caption.fixed:
            message = f"{words!r} praises the picture and describes nothing"
            yield finding("CAP121", one.image, message, words, None, place)
    for words in ready.lexicon.words.speculation:
        place = place_of(words, text) if words in lower_text else None
        if place:
            message = f"{words!r}: the model guesses"
            yield finding("CAP122", one.image, message, words, None, place)
    yield from _other_names(one, ready)


def _other_names(one: Captioned, ready: Ready) -> Iterator[Finding]:
    """Parts between commas that have a canonical name; rendered tags have it already."""
    if not one.caption.by_hand:
        return
    start = 0
    for part in one.caption.text.split(","):
        plain = plain_tag(part)
        name = ready.canonical(plain)
        if plain and name != plain:
            left = start + len(part) - len(part.lstrip())
            place = (left, left + len(part.strip()))
            message = f"elsewhere {plain!r} is called {name!r}"
            yield finding("CAP123", one.image, message, plain, name, place)
        start += len(part) + 1


def _stem(word: str, ready: Ready) -> str:
    """The subjective adjective that `word` is a form of; empty when it is none."""
    listed = ready.lexicon.words.subjective
    forms = [word]
    if word.endswith(("er", "est", "ly")):
        bare = word[: -3 if word.endswith("est") else -2]
        # nicer, prettier, lovely: what is left, its full spelling, or with its y back
        forms += [bare, f"{bare}e", f"{bare.removesuffix('i')}y", bare[:-1]]
    return next((form for form in forms if form in listed), "")

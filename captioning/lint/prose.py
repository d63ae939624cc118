"""Prose: failures of the model, sentences that end too early, and what its tags say otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from captioning.findings import Finding
from captioning.lexicon.names import plain_tag
from captioning.lint.subject import WORD, Captioned, finding, place_of
from captioning.observers.answers import cleaned, fault
from captioning.render_tags import Ready

# Words of prose that mean more than one person, and the tags that say there is one.
_SEVERAL = re.compile(
    r"\b(?:two|three|four|five|several|many|multiple|both|group of|pair of|crowd of)\s+"
    r"(?:\w+\s+){0,2}?(?:girls|women|boys|men|people|persons|characters|ladies|figures)\b",
    re.IGNORECASE,
)
_ONE = {"solo", "1girl", "1boy", "1other"}
_MORE = {"multiple girls", "multiple boys", "2girls", "3girls", "2boys", "3boys", "crowd"}
_ALONE = re.compile(r"\b(?:alone|solitary|by (?:her|him)self)\b", re.IGNORECASE)
# A body takes one of these poses; the tag's word, then how prose says it.
_POSTURES = {
    "standing": ("standing", "stands"),
    "sitting": ("sitting", "sits", "seated"),
    "lying": ("lying", "lies down", "lying down"),
    "kneeling": ("kneeling", "kneels"),
    "squatting": ("squatting", "squats", "crouching"),
}
# Words between a colour and its noun: `purple collared shirt`, `pink and white dress`.
_BETWEEN = 2


def check(one: Captioned, ready: Ready) -> Iterator[Finding]:
    """CAP118, CAP119 and CAP125."""
    caption = one.caption
    prose = caption.prose or (caption.text if caption.by_hand else "")
    if not prose:
        return
    body = ready.trigger.sub(" ", prose) if caption.by_hand else prose
    place = place_of(prose, caption.text)
    if cleaned(body) and (reason := fault(cleaned(body), ended=True)):
        message = f"{reason}: {cleaned(body)[:60]!r}"
        yield finding("CAP118", one.image, message, reason, None, place)
    words = WORD.findall(prose)
    is_prose = not caption.by_hand or len(words) > prose.count(",") * 3 + 3
    last = words[-1] if words else ""
    if is_prose and prose.endswith(last) and last.lower() in ready.lexicon.words.unfinished:
        end = place[1] if place else len(caption.text)
        message = f"it ends in {last!r}"
        yield finding("CAP119", one.image, message, last, None, (end - len(last), end))
    if is_prose:
        yield from _contradictions(one, prose, ready)


def _contradictions(one: Captioned, prose: str, ready: Ready) -> Iterator[Finding]:
    lowest = ready.rules.threshold_of(one.seen.tagger)
    said = {plain_tag(tag): score for tag, score in one.seen.tags.items() if score >= lowest}
    tags = said | dict.fromkeys(one.caption.tags, 1.0)
    for tag, other in _colours(tags, prose, ready):
        message = f"the tagger says {tag!r}, the sentence {other!r}"
        yield finding("CAP125", one.image, message, other, tag, place_of(other, one.caption.text))
    several, alone = _SEVERAL.search(prose), _ALONE.search(prose)
    for found, against in ((several, _ONE), (alone, _MORE)):
        clash = sorted(against & tags.keys())
        if found and clash and not (against is _ONE and _MORE & tags.keys()):
            message = f"the tagger says {clash[0]!r}, the sentence {found[0]!r}"
            place = place_of(found[0], one.caption.text)
            yield finding("CAP125", one.image, message, found[0], clash[0], place)
    mentioned = {
        posture: form
        for posture, forms in _POSTURES.items()
        for form in forms
        if place_of(form, prose)
    }
    tagged = _POSTURES.keys() & tags.keys()
    if mentioned and tagged and not mentioned.keys() & tagged:
        form, tag = next(iter(mentioned.values())), sorted(tagged)[0]
        message = f"the tagger says {tag!r}, the sentence {form!r}"
        yield finding("CAP125", one.image, message, form, tag, place_of(form, one.caption.text))


def _colours(tags: Mapping[str, float], prose: str, ready: Ready) -> Iterator[tuple[str, str]]:
    """(tag, words of the prose) that give one noun different colours."""
    by_noun: dict[str, dict[str, float]] = {}
    for tag, score in tags.items():
        colour, _, noun = tag.rpartition(" ")
        first = colour.split(" ")[0]
        if first in ready.lexicon.colours:
            by_noun.setdefault(noun, {})[first] = score
    words = [word.lower() for word in WORD.findall(prose)]
    spellings = ready.lexicon.words.spellings
    for place, noun in enumerate(words):
        known = by_noun.get(noun)
        before = words[max(0, place - 1 - _BETWEEN) : place]
        # The noun's own colours end where the words before it are another noun's.
        while before and any(word in by_noun for word in before):
            before = before[1:]
        said = [word for word in before if spellings.get(word, word) in ready.lexicon.colours]
        like = {shade for word in said for shade in _shades(spellings.get(word, word), ready)}
        if known and said and not like & known.keys():
            best = max(known, key=lambda colour: (known[colour], colour))
            start = before.index(said[0])
            tag = next(tag for tag in tags if tag.startswith(best) and tag.endswith(noun))
            yield tag, " ".join([*before[start:], noun])


def _shades(colour: str, ready: Ready) -> set[str]:
    """The colour, and those that people call the same (`golden` hair is `blonde`)."""
    return {colour}.union(*(shades for shades in ready.lexicon.words.shades if colour in shades))

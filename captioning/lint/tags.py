"""Tags of one caption: fixed ones, order, replace rules, rivals and overlaps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from captioning.findings import Finding
from captioning.lint.subject import Captioned, finding, place_of
from captioning.render_tags import Ready, visible, would_change
from captioning.rules import LOWEST_SCORE


def check(one: Captioned, ready: Ready) -> Iterator[Finding]:
    """CAP126, CAP131 to CAP133 and CAP135."""
    caption, text = one.caption, one.caption.text
    for rivals, unless in ready.exclusive:
        both = [tag for tag in caption.tags if tag in rivals]
        if len(both) > 1 and not unless.intersection(caption.tags):
            message = f"{both[0]!r} and {both[1]!r} do not go together"
            place = place_of(both[1], text)
            yield finding("CAP126", one.image, message, both[1], both[0], place)
    if caption.by_hand:
        yield from _by_hand(one, ready)
    # A rule counts as done when a later step took away what it added.
    taken = {*caption.lost, *(gone.tag for gone in caption.removed), *caption.tags}
    for number, rule in enumerate(ready.replace, 1):
        undone = rule.remove.intersection(caption.tags) or not taken.issuperset(rule.add)
        if undone and would_change(rule, dict.fromkeys(caption.tags, 1.0)):
            looked_for = next(tag for tag in caption.tags if tag in rule.all | rule.any)
            message = f"replace rule {number} would change it for {looked_for!r}"
            place = place_of(looked_for, text)
            yield finding("CAP133", one.image, message, looked_for, number, place)
    if ready.rules.overlaps:
        for tag in caption.tags:
            longer = next((other for other in caption.tags if _contains(other, tag)), None)
            if longer and tag not in caption.fixed:
                message = f"{longer!r} says {tag!r} already"
                yield finding("CAP135", one.image, message, tag, longer, place_of(tag, text))


def check_unseen_fixed(captions: Sequence[Captioned], ready: Ready) -> Iterator[Finding]:
    """CAP134: a fixed tag with a score under 0.05, on pictures whose tagger knows the tag.

    A tagger knows a tag when it gave it a score on any picture of the set.
    """
    known: dict[str, set[str]] = {}
    for one in captions:
        known.setdefault(one.seen.tagger, set()).update(map(ready.cached_name, one.seen.tags))
    for one in captions:
        scored = {ready.cached_name(tag) for tag in one.seen.tags}
        for tag in one.caption.fixed:
            if tag in known[one.seen.tagger] and tag not in scored:
                message = f"{tag!r} is fixed, and the tagger does not see it here"
                place = place_of(tag, one.caption.text)
                yield finding("CAP134", one.image, message, tag, LOWEST_SCORE, place)


def _by_hand(one: Captioned, ready: Ready) -> Iterator[Finding]:
    """The checks of captions by hand; rendering takes care of these things in all others."""
    text, tags = one.caption.text, one.caption.tags
    for tag, fixed in ready.fixed:
        wanted = fixed.scope == "always" or visible(tag, tags, ready.lexicon)
        if wanted and place_of(tag, text) is None:
            yield finding("CAP131", one.image, f"{tag!r} is fixed and is not there", None, tag)
    known = [tag for tag in tags if ready.lexicon.group(tag).group != "other"]
    known = [tag for tag in known if tag not in ready.fixed_tags]
    ranks = [ready.ranks[ready.lexicon.group(tag).rank] for tag in known]
    for (left, right), (first, second) in zip(pairwise(known), pairwise(ranks), strict=True):
        if first > second:
            message = f"{right!r} stands before {left!r} elsewhere"
            yield finding("CAP132", one.image, message, right, left, place_of(right, text))
            return


def _contains(longer: str, tag: str) -> bool:
    """Whether all words of `tag` are in the other tag too (`kimono` in `red kimono`)."""
    return longer != tag and set(tag.split()) < set(longer.split())

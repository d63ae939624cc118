"""The captions of a set together: leaks, overuse, misspelt tags, captions that are the same."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from captioning.findings import DATASET, Finding
from captioning.lint.subject import WORD, Captioned, finding, place_of
from captioning.lint.trigger import distance
from captioning.render_tags import MIN_PICTURES_FOR_INTRINSIC, Ready

LEAK_SHARE = 0.8  # of the captions; PortOS refuses to train from there
OVERUSED_SHARE, SURE_SCORE = 0.9, 0.5
NEAR_DUPLICATE = 0.9  # Jaccard index
COMMON_COUNT, RARE_COUNT = 3, 1  # a tag so often, and one so like it that stands there once
SHORTEST_TAG = 4  # letters; shorter ones are all alike


def check_set(captions: Sequence[Captioned], ready: Ready) -> Iterator[Finding]:
    """CAP124 and CAP151 to CAP153."""
    yield from _misspelt(captions, ready)
    if len(captions) >= MIN_PICTURES_FOR_INTRINSIC:
        yield from _leaks(captions, ready)
        yield from _overused(captions, ready)
    yield from _near_duplicates(captions, ready)


def _misspelt(captions: Sequence[Captioned], ready: Ready) -> Iterator[Finding]:
    """A tag of one caption that differs by one letter from one of three or more.

    What a tagger or the lexicon says is spelt right, however alike (`hat` and `bat`).
    """
    counts = Counter(tag for one in captions for tag in one.caption.tags)
    right = {ready.cached_name(tag) for one in captions for tag in one.seen.tags}
    common = [tag for tag, count in counts.items() if count >= COMMON_COUNT]
    rare = {
        tag
        for tag, count in counts.items()
        if count == RARE_COUNT
        and len(tag) >= SHORTEST_TAG
        and tag not in right
        and not ready.lexicon.knows(tag)
    }
    near: defaultdict[str, list[str]] = defaultdict(list)
    for tag in sorted(common, key=lambda tag: (-counts[tag], tag)):
        for rest in _one_letter_less(tag):
            near[rest].append(tag)
    meant = {}
    for tag in rare:
        candidates = [other for rest in _one_letter_less(tag) for other in near[rest]]
        close = [other for other in candidates if distance(tag, other, 1) == 1]
        if close:
            meant[tag] = min(close, key=lambda other: (-counts[other], other))
    for one in captions:
        for tag in one.caption.tags:
            if tag in meant:
                message = f"{tag!r} stands there once, {meant[tag]!r} {counts[meant[tag]]} times"
                place = place_of(tag, one.caption.text)
                yield finding("CAP124", one.image, message, tag, meant[tag], place)


def _one_letter_less(tag: str) -> set[str]:
    """The tag, and the tag without each of its letters: two that differ by one letter share one."""
    return {tag} | {tag[:place] + tag[place + 1 :] for place in range(len(tag))}


def _leaks(captions: Sequence[Captioned], ready: Ready) -> Iterator[Finding]:
    """Traits that were to be left out and stand in most captions all the same."""
    if ready.rules.policy != "drop":
        return
    counts = Counter(
        trait for one in captions for trait in _traits(one, ready) if trait not in ready.keep
    )
    for trait, count in sorted(counts.items()):
        share = count / len(captions)
        if share >= LEAK_SHARE and trait not in ready.fixed_tags:
            message = f"{trait!r} is in {count} of {len(captions)} captions, so that the trigger"
            message += " does not learn it"
            others = tuple(one.image for one in captions if trait in _traits(one, ready))
            yield finding("CAP151", DATASET, message, trait, LEAK_SHARE, None, others)


def _traits(one: Captioned, ready: Ready) -> set[str]:
    """Traits among the tags, and pairs of words in the prose that are traits (`pink hair`)."""
    found = {tag for tag in one.caption.tags if ready.is_trait(tag)}
    words = [word.lower() for word in WORD.findall(one.caption.prose)]
    pairs = {" ".join(pair) for pair in pairwise(words)}
    return found | {pair for pair in pairs if _is_whole_trait(pair, ready)}


def _is_whole_trait(pair: str, ready: Ready) -> bool:
    """A trait by name or by its noun, described by a word that describes: not `her hair`."""
    first = pair.split(" ")[0]
    described = first in ready.lexicon.colours or ready.lexicon.knows(pair)
    return described and ready.is_trait(pair)


def _overused(captions: Sequence[Captioned], ready: Ready) -> Iterator[Finding]:
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for one in captions:
        seen: dict[str, float] = {}
        for tag, score in one.seen.tags.items():
            name = ready.cached_name(tag)
            seen[name] = max(score, seen.get(name, 0.0))
        for tag in one.caption.tags:
            if tag in seen and tag not in one.caption.fixed:
                scores[tag].append(seen[tag])
    for tag, given in sorted(scores.items()):
        mean = math.fsum(given) / len(given)
        if len(given) > OVERUSED_SHARE * len(captions) and mean < SURE_SCORE:
            message = f"{tag!r} is in {len(given)} of {len(captions)} captions, at a mean score of"
            message += f" {mean:.2f}"
            yield finding("CAP152", DATASET, message, round(mean, 4), SURE_SCORE)


def _near_duplicates(captions: Sequence[Captioned], ready: Ready) -> Iterator[Finding]:
    """Groups of captions whose tags (or words, for prose) are 90 % the same."""
    said = {one.image: _said(one, ready) for one in captions}
    groups = similar_groups({image: words for image, words in said.items() if words})
    texts = {one.image: one.caption.text for one in captions}
    for group in groups:
        first, *others = group
        message = f"{len(group)} captions say the same: {texts[first][:60]!r}"
        yield finding("CAP153", first, message, len(group), NEAR_DUPLICATE, None, tuple(others))


def _said(one: Captioned, ready: Ready) -> frozenset[str]:
    if one.caption.prose:
        own = {ready.character.trigger.lower(), *ready.class_word.split()}
        return frozenset(word.lower() for word in WORD.findall(one.caption.text)) - own
    return frozenset(one.caption.tags)


def similar_groups(sets: dict[str, frozenset[str]]) -> list[list[str]]:
    """Keys whose sets have a Jaccard index of 0.9 or more, directly or by way of another; sorted.

    Two such sets share one of their few rarest members (prefix filtering, Chaudhuri et al. 2006),
    so that only sets that do are compared.
    """
    rarity = Counter(member for members in sets.values() for member in members)
    leader = {key: key for key in sets}

    def lead(key: str) -> str:
        while leader[key] != key:
            leader[key] = leader[leader[key]]
            key = leader[key]
        return key

    by_set: dict[frozenset[str], str] = {}
    by_member: defaultdict[str, list[frozenset[str]]] = defaultdict(list)
    for key in sorted(sets):
        members = sets[key]
        if members in by_set:
            leader[key] = lead(by_set[members])
            continue
        by_set[members] = key
        rarest = sorted(members, key=lambda member: (rarity[member], member))
        prefix = rarest[: len(members) - math.ceil(NEAR_DUPLICATE * len(members)) + 1]
        for other in {other for member in prefix for other in by_member[member]}:
            shared = len(members & other)
            if shared >= NEAR_DUPLICATE * (len(members) + len(other) - shared):
                leader[lead(key)] = lead(by_set[other])
        for member in prefix:
            by_member[member].append(members)
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for key in sorted(sets):
        groups[lead(key)].append(key)
    return sorted(group for group in groups.values() if len(group) > 1)

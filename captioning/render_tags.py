"""The first half of render(): from a tagger's scores to the tags that stand in a caption.

Pure. Each function is one step of docs/captions.md, in its order; each says what it took away.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from captioning.character import Character
from captioning.edits import Corrections
from captioning.lexicon import Lexicon, lexicon
from captioning.lexicon.names import plain_tag
from captioning.rules import Fixed, Replace

MIN_PICTURES_FOR_INTRINSIC = 4  # a tag on all of three pictures proves little
BY_HAND = 2.0  # the rank of a tag that a person set; models give at most 1
ALWAYS = 3.0  # the rank of a fixed tag


@dataclass(frozen=True)
class Seen:
    """What the models said about one picture."""

    tags: Mapping[str, float] = field(default_factory=dict)
    prose: str = ""
    tagger: str = ""  # its name, for its own threshold
    characters: frozenset[str] = frozenset()  # those of `tags` that name known characters


@dataclass(frozen=True)
class Removed:
    """A tag that a step took away."""

    tag: str
    why: str


@dataclass(frozen=True)
class ReadyRule:
    """A replace rule with canonical names."""

    all: frozenset[str]
    any: frozenset[str]
    remove: frozenset[str]
    add: list[str]


class Ready:
    """A character's rules made ready once for all of its pictures: plain names, looked-up words."""

    def __init__(self, character: Character) -> None:
        rules = character.rules
        self.character, self.rules, self.lexicon = character, rules, lexicon()
        self.trigger = re.compile(rf"(?<!\w){re.escape(character.trigger)}(?!\w)", re.IGNORECASE)
        self.class_word = plain_tag(character.class_word)
        own = {plain_tag(other): plain_tag(name) for other, name in rules.synonyms.items()}
        self._final = frozenset(own.values()) - own.keys()  # the character's choice of a name
        self.synonyms = self.lexicon.synonyms | own
        self.drop = frozenset(map(plain_tag, rules.drop)) | self._set(rules.drop)
        self.replace = [self._rule(rule) for rule in rules.replace]
        self.traits, self.keep = self._set(rules.traits), self._set(rules.keep)
        sets = [(self._set(tags), frozenset[str]()) for tags in rules.exclusive]
        self.exclusive = (*self.lexicon.exclusive, *sets)
        self.rivalries: dict[str, list[int]] = {}  # tag → places in `exclusive`
        for place, (tags, _) in enumerate(self.exclusive):
            for tag in tags:
                self.rivalries.setdefault(tag, []).append(place)
        self.fixed = [(tag, one) for one in rules.fixed if (tag := self.name(one.tag))]
        self.fixed_tags = frozenset(tag for tag, _ in self.fixed)
        self.ranks = {rank: place for place, rank in enumerate(rules.order or self.lexicon.order)}
        self.weights = self.weights_of(rules.weights)
        self._names: dict[str, str] = {}

    def name(self, tag: str) -> str:
        """The tag's canonical name without the trigger in it; empty for trigger and class word."""
        plain = self.canonical(plain_tag(tag))
        passed = set[str]()
        while self.trigger.search(plain):
            plain = plain_tag(self.trigger.sub(" ", plain))
            if plain in passed:
                break
            passed.add(plain)
            plain = self.canonical(plain)  # what is left may have another name again
        return "" if plain == self.class_word else plain

    def names(self, tags: Iterable[str]) -> frozenset[str]:
        """The canonical names of several tags."""
        return frozenset(map(self.name, tags)) - {""}

    def canonical(self, plain: str) -> str:
        """The one to use of several names for the same thing."""
        passed = {plain}
        while plain not in self._final:
            spellings = self.lexicon.words.spellings
            spelled = " ".join(spellings.get(word, word) for word in plain.split(" "))
            plain = self.synonyms.get(plain) or self.synonyms.get(spelled, spelled)
            if plain in passed:
                break
            passed.add(plain)
        return plain

    def cached_name(self, tag: str) -> str:
        """`name`, looked up once per tag: taggers repeat the same few thousand."""
        found = self._names.get(tag)
        if found is None:
            found = self._names[tag] = self.name(tag)
        return found

    def named(self, human: Corrections) -> Corrections:
        """A person's tags in their canonical names, so that any name of a thing will do."""
        added = [name for tag in human.added if (name := self.name(tag))]
        return replace(
            human,
            added=tuple(dict.fromkeys(added)),
            removed=human.removed | self._set(human.removed),
            weights=self.weights_of(human.weights),
        )

    def weights_of(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Emphasis by canonical name."""
        return {self.name(tag): weight for tag, weight in weights.items()}

    def _set(self, tags: Iterable[str]) -> frozenset[str]:
        return frozenset(self.canonical(plain_tag(tag)) for tag in tags)

    def _rule(self, rule: Replace) -> ReadyRule:
        add = [name for tag in rule.add if (name := self.name(tag))]
        return ReadyRule(self._set(rule.all), self._set(rule.any), self._set(rule.remove), add)

    def is_trait(self, tag: str) -> bool:
        """Whether the tag tells who the character is, by lexicon or by its rules."""
        return tag not in self.keep and (tag in self.traits or self.lexicon.group(tag).trait)


@dataclass(frozen=True)
class Gathered:
    """One picture's tags after the steps that need no other picture, best first."""

    scores: dict[str, float]
    removed: tuple[Removed, ...]
    hits: tuple[int, ...]  # places of the replace rules that changed something


def gather(seen: Seen, human: Corrections, ready: Ready) -> Gathered:
    """Normalise names, thresholds, blacklist, synonyms, replace rules."""
    removed: list[Removed] = []
    lowest = ready.rules.threshold_of(seen.tagger)
    scores: dict[str, float] = {}
    accepted = [(-score, tag) for tag, score in seen.tags.items() if score >= lowest]
    if seen.characters:
        enough = ready.rules.character_threshold
        accepted = [one for one in accepted if one[1] not in seen.characters]
        accepted += [
            (-seen.tags[tag], tag) for tag in seen.characters if seen.tags.get(tag, 0) >= enough
        ]
    for minus_score, tag in sorted(accepted):
        name = ready.cached_name(tag)
        if not name or name in scores:
            continue
        plain = plain_tag(tag)
        if plain in ready.drop or name in ready.drop:
            removed.append(Removed(plain, "on the drop list"))
        elif plain in human.removed or name in human.removed:
            removed.append(Removed(name, "removed by hand"))
        else:
            scores[name] = -minus_score
    hits = tuple(place for place, rule in enumerate(ready.replace) if _apply(rule, scores, removed))
    return Gathered(scores, tuple(removed), hits)


def intrinsic_tags(pictures: Sequence[Gathered], ready: Ready) -> frozenset[str]:
    """Tags on at least `intrinsic_share` of the pictures that may be the character's own.

    What belongs to the picture and not to the character (background, framing, expression, ...)
    never is, however often it is seen. Empty with fewer than four pictures.
    """
    if len(pictures) < MIN_PICTURES_FOR_INTRINSIC:
        return frozenset()
    counts = Counter(tag for picture in pictures for tag in picture.scores)
    needed = ready.rules.intrinsic_share * len(pictures)
    return frozenset(
        tag
        for tag, count in counts.items()
        if count >= needed and ready.lexicon.group(tag).slot not in ready.lexicon.situation
    )


def settle(
    gathered: Gathered, human: Corrections, intrinsic: frozenset[str], ready: Ready
) -> tuple[dict[str, float], list[str], tuple[Removed, ...]]:
    """Intrinsic policy, exclusive groups, fixed tags, human tags, body order.

    Gives (scores of the tags in caption order, the fixed ones among them, all that was removed).
    """
    scores, removed = dict(gathered.scores), list(gathered.removed)
    if ready.rules.policy == "drop":
        _drop_traits(scores, removed, intrinsic, ready)
    _keep_best(scores, removed, ready)
    wanted = _fixed_here(scores, human, intrinsic, ready)
    joined = dict.fromkeys(human.added, BY_HAND) | dict.fromkeys(wanted, ALWAYS)
    if joined:
        scores |= joined
        _keep_best(scores, removed, ready)
    for tag in human.removed & scores.keys():
        del scores[tag]
        removed.append(Removed(tag, "removed by hand"))
    fixed = [tag for tag in wanted if tag in scores]
    free = [tag for tag in scores if tag not in set(fixed)]
    best = sorted(free, key=lambda tag: (-scores[tag], tag))
    removed += [Removed(tag, "over max_tags") for tag in best[ready.rules.max_tags :]]
    ordered = sorted(
        best[: ready.rules.max_tags], key=lambda tag: ready.ranks[ready.lexicon.group(tag).rank]
    )
    return {tag: scores[tag] for tag in (*fixed, *ordered)}, fixed, tuple(removed)


def visible(tag: str, tags: Iterable[str], words: Lexicon) -> bool:
    """Whether what `tag` names can be seen in a picture with `tags`: by framing and by cover."""
    present = dict.fromkeys(tags)
    group = words.group(tag)
    if any(cover in present for cover in group.hidden_by):
        return False
    shown = words.shown_ranks(present)
    return shown is None or group.rank not in words.body or group.rank in shown


def _apply(rule: ReadyRule, scores: dict[str, float], removed: list[Removed]) -> bool:
    """Change `scores` by one rule; whether it changed anything."""
    matched = matches(rule, scores)
    if not matched:
        return False
    score = min(scores[tag] for tag in matched)  # what came of several is as sure as the least
    gone = [tag for tag in scores if tag in rule.remove and tag not in rule.add]
    new = [tag for tag in rule.add if tag and tag not in scores]
    for tag in gone:
        del scores[tag]
        removed.append(Removed(tag, "by a replace rule"))
    scores.update(dict.fromkeys(new, score))
    return bool(gone or new)


def matches(rule: ReadyRule, tags: Mapping[str, float]) -> list[str]:
    """The tags by which the rule applies; none when it does not."""
    if not rule.all <= tags.keys() or (rule.any and not rule.any & tags.keys()):
        return []
    return [tag for tag in tags if tag in rule.all or tag in rule.any]


def would_change(rule: ReadyRule, tags: Mapping[str, float]) -> bool:
    """Whether the rule, applied to these tags, would change them."""
    return _apply(rule, dict(tags), [])


def _fixed_here(
    scores: Mapping[str, float], human: Corrections, intrinsic: frozenset[str], ready: Ready
) -> list[str]:
    """The fixed tags of this picture: the rules', then the traits when those are `fixed`."""
    listed = list(ready.fixed)
    if ready.rules.policy == "fixed":
        own = sorted((intrinsic | ready.traits) - ready.fixed_tags - {""})
        listed += [(tag, Fixed(tag=tag)) for tag in own]
    seen = [*scores, *human.added]
    chosen = [
        tag
        for tag, one in listed
        if tag not in human.removed and (one.scope == "always" or visible(tag, seen, ready.lexicon))
    ]
    return list(dict.fromkeys(chosen))


def _drop_traits(
    scores: dict[str, float], removed: list[Removed], intrinsic: frozenset[str], ready: Ready
) -> None:
    stay = ready.keep | ready.fixed_tags
    for tag in [tag for tag in scores if tag not in stay]:
        if tag in intrinsic or ready.is_trait(tag):
            del scores[tag]
            removed.append(Removed(tag, "the character's own trait"))


def _keep_best(scores: dict[str, float], removed: list[Removed], ready: Ready) -> None:
    """Keep the best of tags that exclude one another, by name if equal, and all that people set.

    Works through the groups in the order of lexicon/words.yaml, then the character's own.
    """
    met, crowded = set[int](), set[int]()
    for tag in scores:
        for place in ready.rivalries.get(tag, ()):
            (crowded if place in met else met).add(place)
    for place in sorted(crowded):
        tags, unless = ready.exclusive[place]
        rivals = tags & scores.keys()
        if len(rivals) < 2 or unless & scores.keys():
            continue
        best = min(rivals, key=lambda tag: (-scores[tag], tag))
        for tag in sorted(rivals - {best}):
            if scores[tag] <= 1:
                del scores[tag]
                removed.append(Removed(tag, f"excluded by {best}"))

"""What tags mean: the shipped vocabulary of captions, read from the YAML files beside this one.

A tag in, its group out: where on the body it belongs, which part of a caption, identity or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from captioning.config import load_config

Part = Literal["subject", "attributes", "scene", "style"]
PARTS: tuple[Part, ...] = ("subject", "attributes", "scene", "style")
_FOLDER = Path(__file__).parent
KNOWN_TAGS = 100_000  # whose group is kept in memory


class Group(BaseModel):
    """Tags that mean things of one kind; see groups.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group: str
    rank: str
    part: Part
    slot: str
    trait: bool
    tags: tuple[str, ...] = ()
    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    hidden_by: tuple[str, ...] = ()


OTHER = Group(group="other", rank="other", part="attributes", slot="other", trait=False)


class Exclusive(BaseModel):
    """Tags of which one picture has one, unless it has a tag of `unless`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    tags: tuple[str, ...] = ()
    colours_of: str = Field("", description="Every colour before this noun.")
    unless: tuple[str, ...] = ()


class Family(BaseModel):
    """What captions are like for one family of base models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    intrinsic: Literal["drop", "keep", "fixed"]
    encoder: str
    tokens: int = Field(ge=1)


class _Groups(BaseModel):
    model_config = ConfigDict(extra="forbid")
    groups: tuple[Group, ...]


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid")
    order: tuple[str, ...]
    body: frozenset[str]
    situation: frozenset[str]
    shows: dict[str, frozenset[str]]


class _Words(BaseModel):
    model_config = ConfigDict(extra="forbid")
    synonyms: dict[str, tuple[str, ...]]
    spellings: dict[str, str]
    colours: tuple[str, ...]
    shades: tuple[frozenset[str], ...]
    exclusive: tuple[Exclusive, ...]
    subjective: frozenset[str]
    subjective_tags: frozenset[str]
    speculation: tuple[str, ...]
    unfinished: frozenset[str]
    common: frozenset[str]


class _Models(BaseModel):
    model_config = ConfigDict(extra="forbid")
    thresholds: dict[str, float]
    threshold: float
    families: dict[str, Family]


class Lexicon:
    """All of the vocabulary; made once, by `lexicon()`."""

    def __init__(self) -> None:
        self.groups = load_config(_Groups, _FOLDER / "groups.yaml").groups
        order = load_config(_Order, _FOLDER / "order.yaml")
        self.order, self.body, self.shows = order.order, order.body, order.shows
        self.situation = order.situation
        self.words = load_config(_Words, _FOLDER / "words.yaml")
        self.models = load_config(_Models, _FOLDER / "models.yaml")
        self.colours = frozenset(self.words.colours)
        self.synonyms = {
            other: name for name, others in self.words.synonyms.items() for other in others
        }
        self.exclusive = tuple(map(self._exclusive, self.words.exclusive))
        self._whole = {tag: group for group in self.groups for tag in group.tags}
        self._begins = {words: group for group in self.groups for words in group.begins}
        self._ends = {words: group for group in self.groups for words in group.ends}
        self.group = lru_cache(KNOWN_TAGS)(self._group)

    def _exclusive(self, one: Exclusive) -> tuple[frozenset[str], frozenset[str]]:
        coloured = {f"{colour} {one.colours_of}" for colour in self.words.colours}
        tags = {*one.tags, *(coloured if one.colours_of else ())}
        return frozenset(tags), frozenset(one.unless)

    def _group(self, tag: str) -> Group:
        """The group of a tag in lower case with spaces; `OTHER` when none knows it."""
        found = self._whole.get(tag)
        if found is not None:
            return found
        words = tag.split(" ")
        for length in range(len(words) - 1, 0, -1):
            found = self._begins.get(" ".join(words[:length]))
            if found is not None:
                return found
        for start in range(len(words)):
            found = self._ends.get(" ".join(words[start:]))
            if found is not None:
                return found
        return OTHER

    def knows(self, tag: str) -> bool:
        """Whether the tag stands in the lexicon by its whole name."""
        return tag in self._whole or tag in self.words.synonyms or tag in self.synonyms

    def threshold(self, tagger: str) -> float:
        """The score from which a tag of this tagger counts; `owner--name` is read as `name`."""
        return self.models.thresholds.get(tagger.rsplit("--", 1)[-1], self.models.threshold)

    def family(self, name: str) -> Family:
        return self.models.families[name]

    def shown_ranks(self, tags: Mapping[str, object]) -> frozenset[str] | None:
        """The parts of the body that a picture with these tags shows; None means all of them."""
        framings = [self.shows[tag] for tag in tags if tag in self.shows]
        return frozenset.intersection(*framings) if framings else None


@cache
def lexicon() -> Lexicon:
    """The shipped vocabulary, read once per process."""
    return Lexicon()

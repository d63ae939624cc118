"""Caption rules: what the models said about a picture in, the caption out.

Pure: the same observations and rules always give the same text. Trigger first, always.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SEPARATOR = ", "
MIN_PICTURES_FOR_INTRINSIC = 4


class Rules(BaseModel):
    """How captions are rendered from observations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float = Field(
        0.35,
        ge=0.05,
        le=1,
        description="Lowest tag score that counts; 0.35 is the WD taggers' usual choice. "
        "Observations keep scores from 0.05.",
    )
    form: Literal["tags", "prose", "tags+prose"] = Field(
        "tags", description="tags: booru-style. prose: the captioner's sentence. Or both."
    )
    drop: tuple[str, ...] = Field(
        (), description="Tags that never enter a caption, such as `watermark`."
    )
    max_tags: int = Field(40, ge=1, le=200, description="At most this many tags, best first.")
    intrinsic: Literal["keep", "prune"] = Field(
        "prune",
        description="prune: a tag seen on nearly every picture belongs to the character, so the "
        "trigger absorbs it. keep: it stays in the captions.",
    )
    intrinsic_share: float = Field(
        0.85, gt=0.5, le=1, description="What `nearly every` means: this share of the pictures."
    )


def accepted(tags: Mapping[str, float], rules: Rules) -> list[str]:
    """The tags at or over the threshold and not dropped, best first, equal scores by name.

    A tag has one spelling: no commas, single spaces, and no second one that differs in case only.
    """
    dropped = {_plain(tag).casefold() for tag in rules.drop}
    kept: dict[str, str] = {}
    for tag in sorted(tags, key=lambda tag: (-tags[tag], tag)):
        plain = _plain(tag)
        if plain and tags[tag] >= rules.threshold and plain.casefold() not in dropped:
            kept.setdefault(plain.casefold(), plain)
    return list(kept.values())


def intrinsic_tags(pictures: Iterable[Mapping[str, float]], rules: Rules) -> frozenset[str]:
    """Tags accepted on at least `intrinsic_share` of the pictures; empty for `keep`.

    Takes each picture's tag scores. With fewer than four pictures nothing is intrinsic: a tag on
    all of three pictures proves little.
    """
    lists = [accepted(tags, rules) for tags in pictures]
    if rules.intrinsic == "keep" or len(lists) < MIN_PICTURES_FOR_INTRINSIC:
        return frozenset()
    counts = Counter(tag for tags in lists for tag in tags)
    needed = rules.intrinsic_share * len(lists)
    return frozenset(tag for tag, count in counts.items() if count >= needed)


def render(
    trigger: str,
    class_word: str,
    tags: Mapping[str, float],
    prose: str,
    intrinsic: frozenset[str],
    rules: Rules,
) -> str:
    """One line: the trigger, the class word, then tags and/or prose as `rules.form` says.

    No tag twice, none that is the trigger or the class word, none in `intrinsic`.
    """
    parts = [trigger, class_word]
    if rules.form != "prose":
        absorbed = {tag.casefold() for tag in (trigger, class_word, *intrinsic)}
        tags_left = [tag for tag in accepted(tags, rules) if tag.casefold() not in absorbed]
        parts += tags_left[: rules.max_tags]
    sentence = " ".join(prose.split()).rstrip(". ")
    if rules.form != "tags" and sentence:
        parts.append(sentence)
    return SEPARATOR.join(parts)


def _plain(tag: str) -> str:
    """One line without commas, which would make two tags of it."""
    return " ".join(tag.replace(",", " ").split())

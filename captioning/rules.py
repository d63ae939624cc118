"""Caption rules: what a character's captions are made by. Values only; `render.py` applies them.

Every field is documented, with the source of its default; docs/captions.md shows them in use.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from captioning.lexicon import lexicon

Form = Literal["tags", "prose", "tags+prose", "prose+tags", "four-part"]
Policy = Literal["drop", "keep", "fixed"]
LOWEST_SCORE = 0.05  # what observations keep; no threshold can be lower


class Replace(BaseModel):
    """`all` and `any` seen → `remove` goes, `add` comes. Rules are applied in their order, once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    all: tuple[str, ...] = Field((), description="Every one of these must be there.")
    any: tuple[str, ...] = Field((), description="At least one of these must be there.")
    remove: tuple[str, ...] = ()
    add: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self.all and not self.any:
            raise ValueError("say in `all` or `any` which tags it looks for")
        if not self.remove and not self.add:
            raise ValueError("say in `remove` or `add` what it changes")
        return self


class Fixed(BaseModel):
    """A tag of the character's that a person wants in the captions, whatever a model says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tag: str = Field(min_length=1)
    scope: Literal["always", "when_visible"] = Field(
        "when_visible",
        description="when_visible: not where the picture's framing leaves that part of the body "
        "out, or another tag says that it cannot be seen.",
    )


class Rules(BaseModel):
    """How captions are rendered from observations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Form = Field(
        "tags",
        description="tags: booru-style. prose: the captioner's sentence. tags+prose: both. "
        "prose+tags: the sentence, then the tags of camera, light and style that it leaves out. "
        "four-part: tags as subject, attributes, scene, style.",
    )
    family: Literal["sd15", "sdxl", "sd3", "flux"] = Field(
        "sd15", description="Of the base model; decides the defaults of lexicon/models.yaml."
    )
    threshold: float | None = Field(
        None,
        ge=LOWEST_SCORE,
        le=1,
        description="Lowest score of a tag that counts. None: where the tagger's own precision "
        "equals its recall, 0.35 for taggers we know no number of (lexicon/models.yaml).",
    )
    thresholds: dict[str, float] = Field(
        {}, description="The same for one tagger, by its name; goes before `threshold`."
    )
    character_threshold: float = Field(
        1.1,
        ge=LOWEST_SCORE,
        description="Lowest score of the name of a known character. Over 1 is never: such a name "
        "would take the trigger's place (Dataset Maker's setting when a character is trained).",
    )
    drop: tuple[str, ...] = Field(
        (), description="Tags that never enter a caption, such as `watermark`."
    )
    synonyms: dict[str, str] = Field(
        {}, description="Other name → the one to use, beside those of lexicon/words.yaml."
    )
    replace: tuple[Replace, ...] = Field((), description="Replace rules, in order.")
    intrinsic: Policy | None = Field(
        None,
        description="The character's own traits. drop: left out, so that the trigger learns them. "
        "keep: treated like any tag. fixed: in every caption where they can be seen. None: the "
        "family's default.",
    )
    intrinsic_share: float = Field(
        0.8,
        gt=0.5,
        le=1,
        description="A tag on this share of the pictures is a trait as well (PortOS's leak limit).",
    )
    traits: tuple[str, ...] = Field((), description="Traits that no list and no share tells.")
    keep: tuple[str, ...] = Field((), description="Traits that `drop` leaves in all the same.")
    exclusive: tuple[tuple[str, ...], ...] = Field(
        (), description="Further sets of tags of which only the best one stays."
    )
    fixed: tuple[Fixed, ...] = Field(
        (), description="Right after trigger and class word, in order."
    )
    order: tuple[str, ...] | None = Field(
        None, description="Ranks, first to last; None is feet to head, see lexicon/order.yaml."
    )
    max_tags: int = Field(40, ge=1, le=200, description="At most this many tags, best first.")
    encoder: str | None = Field(
        None, description="`clip`, or a tokenizer by folder or hub id. None: the family's."
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens that the trainer reads, without start and end: 75 for CLIP, 150 or "
        "225 with kohya's max_token_length. None: the family's, or the encoder's own.",
    )
    weights: dict[str, float] = Field(
        {}, description="Tag → emphasis. Written only where `weight_syntax` says so."
    )
    weight_syntax: bool = Field(
        False,
        description="Write `(red eyes:1.3)`. Only sd-scripts with --weighted_captions reads it; "
        "every other trainer learns the brackets and the number as words.",
    )
    overlaps: bool = Field(
        False, description="Lint tags that another tag contains (`kimono` in `red kimono`)."
    )

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        ranks = lexicon().order
        if self.order is not None and sorted(self.order) != sorted(ranks):
            raise ValueError(f"order must name each of these once: {', '.join(ranks)}")
        for tagger, score in self.thresholds.items():
            if not LOWEST_SCORE <= score <= 1:
                raise ValueError(f"thresholds: {tagger}: {score} is not in {LOWEST_SCORE}..1")
        for tag, weight in self.weights.items():
            if not 0 < weight <= 2:
                raise ValueError(f"weights: {tag}: {weight} is not over 0 and at most 2")
        return self

    @property
    def policy(self) -> Policy:
        """The intrinsic policy that holds: the character's, else the family's."""
        return self.intrinsic or lexicon().family(self.family).intrinsic

    def threshold_of(self, tagger: str) -> float:
        """The lowest score that counts for this tagger's tags."""
        own = self.thresholds.get(tagger, self.threshold)
        return lexicon().threshold(tagger) if own is None else own

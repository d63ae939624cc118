"""What is asked of every checkpoint: the scoring config, its prompts, seeds and limits.

A config and a dataset's trigger and class word in, the list of pictures to make out. Pure; the
pictures are the same for every checkpoint of a sweep and for the bare base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from training.strict import Strict

SUBJECT_SLOT = "{subject}"
# Words of framing, expression, clothing and background colour, which every base knows, and which
# differ between the prompts so that prompt fidelity has something to tell apart.
DEFAULT_PROMPTS = (
    "{subject}, portrait, smile, red shirt, white background",
    "{subject}, close-up, laughing, blue background",
    "{subject}, portrait, sad, green shirt, grey background",
    "{subject}, far view, smile, yellow shirt, green background",
    "{subject}, close-up, open mouth, pink background",
    "{subject}, portrait, glasses, blue shirt, yellow background",
    "{subject}, portrait, closed eyes, orange shirt, purple background",
)
DEFAULT_UNRELATED = (
    "a red house with a garden",
    "a blue car on a street",
    "a bowl of fruit on a table",
    "a white dog on green grass",
    "a mountain under a blue sky",
    "a yellow flower in a vase",
)
# Noise seeds start here. Prompts have their own noise: pictures that share their noise share their
# layout, and a bootstrap that took them as independent would give too narrow intervals.
FIRST_SEED = 100_000
SEEDS_PER_PROMPT = 1_000
FIRST_UNRELATED_SEED = 10_000_000
# 8 pictures of 512 px at once, with guidance 16 in the UNet, fit into about 8 GB of fp16.
BATCH_PIXELS = 8 * 512 * 512

Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=400)]
Kind = Literal["subject", "class_word", "unrelated"]


class Limits(Strict):
    """The guards: a checkpoint beyond any of them cannot win while another passes.

    They are compared with the measure's value. None switches a guard off.
    """

    prompt_fidelity_min: float | None = Field(
        0.5,
        description="1 is the base's own prompt fidelity, 0 a model that ignores the prompt: at "
        "least half of it has to be left.",
    )
    drift_max: float | None = Field(
        0.5,
        ge=0,
        le=2,
        description="Mean 1 - cosine to the base's pictures of unrelated prompts.",
    )
    memorisation_max: float | None = Field(
        0.5, ge=0, le=1, description="Share of pictures that are copies of a training picture."
    )


class ScoringConfig(Strict):
    """How checkpoints are scored; equal configs give comparable scores."""

    prompts: tuple[Prompt, ...] = Field(
        DEFAULT_PROMPTS,
        min_length=2,
        max_length=500,
        description="Prompts of the character; {subject} becomes 'trigger, class word'.",
    )
    unrelated: tuple[Prompt, ...] = Field(
        DEFAULT_UNRELATED,
        min_length=1,
        max_length=500,
        description="Prompts without the character, for drift.",
    )
    seeds: int = Field(
        3, ge=1, le=100, strict=True, description="Pictures of every prompt of the character."
    )
    control_seeds: int = Field(
        1,
        ge=1,
        le=100,
        strict=True,
        description="Pictures of every unrelated prompt, and of every prompt with the class word "
        "alone (for leak).",
    )
    steps: int = Field(25, ge=1, le=1000, strict=True, description="DDIM steps.")
    guidance: float = Field(
        4.0, ge=1, le=30, description="Classifier-free guidance; 1: none, at half the cost."
    )
    negative: str = Field("", max_length=400, description="The negative prompt.")
    size_px: int | None = Field(
        None, ge=8, le=4096, strict=True, description="Side of the pictures. None: the base's own."
    )
    embedder: str | None = Field(
        None, description="Path or hub id of a CLIP model. None: the one that is shipped."
    )
    limits: Limits = Field(default_factory=Limits, description="The guards.")
    bootstrap: int = Field(
        1000, ge=100, le=100_000, strict=True, description="Resamples behind every interval."
    )
    bootstrap_seed: int = Field(0, ge=0, strict=True, description="Of the resamples.")

    @field_validator("prompts")
    @classmethod
    def _prompts_name_the_subject_and_differ(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in prompts:
            if prompt.count(SUBJECT_SLOT) != 1:
                raise ValueError(f"{prompt!r} must contain {SUBJECT_SLOT} exactly once")
        if len(set(prompts)) != len(prompts):
            raise ValueError("two prompts are equal; use `seeds` for more pictures of a prompt")
        return prompts

    @field_validator("unrelated")
    @classmethod
    def _unrelated_leave_the_subject_out(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in prompts:
            if SUBJECT_SLOT in prompt:
                raise ValueError(f"{prompt!r} must not contain {SUBJECT_SLOT}")
        return prompts

    def images_per_checkpoint(self) -> int:
        """How many pictures one score takes."""
        controls = (len(self.prompts) + len(self.unrelated)) * self.control_seeds
        return len(self.prompts) * self.seeds + controls


@dataclass(frozen=True)
class Cell:
    """One picture to make: what is asked, and from which noise."""

    kind: Kind
    prompt_index: int  # in the config's `prompts`, or in its `unrelated`
    seed_index: int
    prompt: str  # as the model gets it
    seed: int  # of its noise

    @property
    def name(self) -> str:
        return f"{self.kind}-p{self.prompt_index:02d}-s{self.seed_index:02d}"


def plan_cells(config: ScoringConfig, trigger: str, class_word: str) -> tuple[Cell, ...]:
    """All pictures of one score: the character's first, then class word alone, then unrelated.

    The class-word pictures start from the same noise as the character's: side by side they differ
    by the trigger alone.
    """
    cells = [
        Cell(kind, p, s, prompt.replace(SUBJECT_SLOT, subject), _seed(FIRST_SEED, p, s))
        for kind, subject, seeds in _subject_kinds(config, trigger, class_word)
        for p, prompt in enumerate(config.prompts)
        for s in range(seeds)
    ]
    cells += [
        Cell("unrelated", p, s, prompt, _seed(FIRST_UNRELATED_SEED, p, s))
        for p, prompt in enumerate(config.unrelated)
        for s in range(config.control_seeds)
    ]
    return tuple(cells)


def class_word_prompts(config: ScoringConfig, class_word: str) -> list[str]:
    """The prompts as an embedder can judge them: the trigger is no word that it knows."""
    return [prompt.replace(SUBJECT_SLOT, class_word) for prompt in config.prompts]


def images_per_batch(size_px: int) -> int:
    """How many pictures of this size are made at once."""
    return max(1, BATCH_PIXELS // size_px**2)


def _subject_kinds(
    config: ScoringConfig, trigger: str, class_word: str
) -> tuple[tuple[Kind, str, int], ...]:
    return (
        ("subject", f"{trigger}, {class_word}", config.seeds),
        ("class_word", class_word, config.control_seeds),
    )


def _seed(first: int, prompt_index: int, seed_index: int) -> int:
    return first + SEEDS_PER_PROMPT * prompt_index + seed_index

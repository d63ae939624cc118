"""The score of a checkpoint and of the bare base, as they lie on disk.

Strict records in and out of JSON; nothing is computed here. A score names everything that it can be
compared by: what was asked, of which embedder, against which pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import load_file

from captioning import UserError, parse_config, write_atomic
from training.scoring.measures import Interval
from training.scoring.prompts import Cell, Kind, ScoringConfig

SCORES_FILE = "scores.json"
SAMPLES_FOLDER = "samples"
VECTORS_FILE = "vectors.safetensors"
MEASURES = ("identity", "prompt_fidelity", "drift", "leak", "memorisation", "diversity")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Picture(_Strict):
    """One picture of a score: its file beside `scores.json`, and what was asked for."""

    file: str
    kind: Kind
    prompt_index: int
    seed_index: int
    prompt: str
    seed: int

    @classmethod
    def of(cls, cell: Cell) -> Picture:
        return cls(
            file=f"{SAMPLES_FOLDER}/{cell.name}.png",
            kind=cell.kind,
            prompt_index=cell.prompt_index,
            seed_index=cell.seed_index,
            prompt=cell.prompt,
            seed=cell.seed,
        )


class Measured(_Strict):
    """The six measures, what they were normalised by, and what they rest on.

    Intervals are percentile bootstrap 95 % over the pictures (prompts × seeds). They hold for this
    reference set: it is not resampled.
    """

    base_key: str = Field(
        description="A hash of base model, dataset version, prompts, seeds and embedder: scores "
        "are comparable if and only if it is equal."
    )
    identity: Interval = Field(
        description="(identity_raw - floor) / (ceiling - floor): 0 is the bare base, 1 the "
        "references among themselves."
    )
    identities: tuple[float, ...] = Field(
        description="The identity of every picture of the character, in the order of `pictures`; "
        "their mean is identity. Checkpoints are compared picture by picture."
    )
    prompt_fidelity: Interval = Field(
        description="How far pictures are nearer to their own prompt (trigger left out) than to "
        "the other prompts, as a share of what the base reaches: 1 is the base, 0 ignores prompts. "
        "Paired with the base by prompt and seed."
    )
    drift: Interval = Field(
        description="1 - cosine to the base's picture of the same unrelated prompt and seed."
    )
    leak: Interval = Field(
        description="How far the class word without trigger moved from the base towards the "
        "references, on the scale of identity, paired by prompt and seed."
    )
    memorisation: Interval = Field(
        description="Share of pictures that are nearer to one training picture than those are to "
        "each other."
    )
    diversity: Interval = Field(description="Mean 1 - cosine between the pictures.")
    identity_raw: Interval = Field(description="Mean cosine to the references.")
    prompt_cosine: Interval = Field(description="Mean cosine to the own prompt, trigger left out.")
    base_identity: Interval = Field(
        description="The bare base's identity: 0, and how far pictures alone spread it."
    )
    floor: float = Field(description="identity_raw of the bare base.")
    ceiling: float = Field(description="Mean cosine of the references among themselves.")
    identity_normalised: bool = Field(
        description="False: ceiling and floor cannot be told apart, and identity and leak are "
        "plain differences of cosines."
    )
    prompt_fidelity_normalised: bool = Field(
        description="False: the base itself ignores the prompts, and prompt_fidelity is 1 plus a "
        "plain difference of cosines."
    )
    references: Literal["holdout", "train"] = Field(
        description="Which pictures identity compares with; train when too few are held out."
    )
    reference_count: int
    embedder: str
    embedder_revision: str
    config: ScoringConfig
    pictures: tuple[Picture, ...]
    notes: tuple[str, ...] = Field((), description="What a reader has to know, in sentences.")

    def measures(self) -> Mapping[str, Interval]:
        """The six measures by name, in the order in which people see them."""
        return {name: getattr(self, name) for name in MEASURES}

    def row(self, folder: Path, seed_index: int = 0) -> tuple[Path, ...]:
        """The character's pictures at one seed, one per prompt: a row of a contact sheet."""
        return tuple(
            folder / picture.file
            for picture in self.pictures
            if picture.kind == "subject" and picture.seed_index == seed_index
        )

    def save(self, folder: Path) -> None:
        """Write `scores.json`; it is what makes a score complete, so it comes last."""
        text = self.model_dump_json(indent=1, exclude={"folder"}) + "\n"
        write_atomic(folder / SCORES_FILE, text.encode())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the `scores.json` of a folder; UserError if it is missing or malformed."""
        path = folder / SCORES_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                str(path), "cannot be read", "score the checkpoint; the sweep does it when resumed"
            ) from error
        return cls._parse(text, folder)

    @classmethod
    def _parse(cls, text: str, folder: Path) -> Self:
        return parse_config(cls, cls._data(text, folder), str(folder / SCORES_FILE))

    @classmethod
    def _data(cls, text: str, folder: Path) -> object:
        from json import JSONDecodeError, loads

        try:
            return loads(text)
        except JSONDecodeError as error:
            raise UserError(
                str(folder / SCORES_FILE), f"is not JSON ({error})", "delete it and score again"
            ) from error


class Score(Measured):
    """A checkpoint's score."""

    @classmethod
    def _parse(cls, text: str, folder: Path) -> Self:
        """Read the JSON in one pass, since a leaderboard reads hundreds of scores."""
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return super()._parse(text, folder)  # which says what is wrong, and where


class BaseScores(Measured):
    """The bare base's pictures and measures, and the embeddings that every score needs."""

    folder: Path = Field(description="Where its files lie.")
    base_precision: str = Field(
        "auto", description="The form of the base that drew its pictures; see the recipe's."
    )

    @classmethod
    def _data(cls, text: str, folder: Path) -> object:
        data = super()._data(text, folder)
        return data | {"folder": folder} if isinstance(data, dict) else data

    def vectors(self) -> dict[str, NDArray[np.float64]]:
        """Unit embeddings: subject, class_word, unrelated, references, train, prompts."""
        loaded = load_file(self.folder / VECTORS_FILE)
        return {name: rows.astype(np.float64) for name, rows in loaded.items()}

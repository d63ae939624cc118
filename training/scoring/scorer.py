"""Scores a checkpoint against the bare base and the character's held-out pictures.

A base (with the adapter on it), a dataset version and an embedder in; pictures, measures with
intervals and `scores.json` out. The base's own pictures and all embeddings of the dataset are
computed once per sweep and reused. Never trains, never changes the adapter.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import save

from captioning import DatasetVersion, Sample, UserError, write_atomic
from training.data.crop import read_pixels
from training.families import Base
from training.pack.adapters import is_attached
from training.scoring import measures
from training.scoring.measures import Floats, Interval
from training.scoring.prompts import (
    Cell,
    ScoringConfig,
    class_word_prompts,
    images_per_batch,
    plan_cells,
)
from training.scoring.sampling import sample
from training.scoring.scores import SCORES_FILE, VECTORS_FILE, BaseScores, Picture, Score

# Part of every key: raise it when pictures or measures come out differently.
FORMAT = 2
# With fewer held-out pictures the leave-one-out ceiling is the similarity of a single pair.
MIN_HOLDOUT_REFERENCES = 3
# Cosines of pictures of one prompt differ by a few hundredths from picture to picture; a difference
# of means below this is noise, and dividing by it would make a number of it.
MIN_SPAN = 0.01

Kinds = ("subject", "class_word", "unrelated")


class Embedder(Protocol):
    """What scoring needs of CLIP or of a model like it: unit vectors of pictures and of texts."""

    @property
    def id(self) -> str: ...

    @property
    def revision(self) -> str: ...

    def embed_images(self, images: list[Image.Image], /) -> NDArray[Any]:  # (N, D)
        ...

    def embed_texts(self, texts: list[str], /) -> NDArray[Any]:  # (N, D)
        ...


@dataclass(frozen=True)
class References:
    """The pictures that identity compares with."""

    source: Literal["holdout", "train"]
    samples: tuple[Sample, ...]


def choose_references(dataset: DatasetVersion) -> References:
    """The held-out pictures, or the training pictures when fewer than three are held out.

    Raises UserError if there are fewer than two training pictures: then neither a ceiling nor
    memorisation can be measured.
    """
    if len(dataset.train) < 2:
        raise UserError(
            f"dataset {dataset.name}",
            f"{len(dataset.train)} training picture(s)",
            "add pictures: scoring needs two, and a good adapter about twenty",
        )
    if len(dataset.holdout) >= MIN_HOLDOUT_REFERENCES:
        return References("holdout", dataset.holdout)
    return References("train", dataset.train)


def scoring_key(
    base: Base,
    dataset: DatasetVersion,
    config: ScoringConfig,
    embedder: Embedder,
    base_precision: str = "auto",
) -> str:
    """32 hex digits of all that a score rests on besides the adapter; the limits are not in it.

    `base_precision` is the form of the base whose bare pictures the score is compared with.
    """
    content = {
        "format": FORMAT,
        "base": base.content_hash,
        # Rounded weights draw other pictures. Older keys, of whole bases, are as they were.
        **({} if base_precision == "auto" else {"base_precision": base_precision}),
        "size_px": config.size_px or base.native_size_px,
        "dataset": [dataset.manifest_sha256, dataset.trigger, dataset.class_word],
        "config": config.model_dump(mode="json", exclude={"limits", "embedder", "size_px"}),
        "embedder": [embedder.id, embedder.revision],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def score_base(
    base: Base,
    dataset: DatasetVersion,
    config: ScoringConfig,
    embedder: Embedder,
    out_dir: Path,
    base_precision: str = "auto",
) -> BaseScores:
    """The bare base at the prompts and seeds of `config`, and the embeddings of the dataset.

    `base_precision` is the form in which `base` was loaded; see `load_quantised`. The scores lie in
    `out_dir/<key>/` and are read from there when they are complete. Raises RuntimeError if an
    adapter is on the base, UserError as `choose_references` does and for pictures that cannot be
    read.
    """
    if is_attached(base):
        raise RuntimeError("an adapter is on the base; detach it before scoring the base")
    folder = out_dir / scoring_key(base, dataset, config, embedder, base_precision)
    existing = _complete(folder)
    if existing is not None:
        return existing
    references = choose_references(dataset)
    size_px = config.size_px or base.native_size_px
    cells = plan_cells(config, dataset.trigger, dataset.class_word)
    vectors = _draw_and_embed(base, config, cells, embedder, folder)
    vectors["references"] = _embed_samples(references.samples, size_px, embedder)
    vectors["train"] = _embed_samples(dataset.train, size_px, embedder)
    texts = class_word_prompts(config, dataset.class_word)
    vectors["prompts"] = measures.unit_rows(embedder.embed_texts(texts), "prompt embeddings")
    measured = _measure(vectors, vectors, config, cells)
    scores = BaseScores(
        **measured,
        base_key=folder.name,
        references=references.source,
        reference_count=len(references.samples),
        embedder=embedder.id,
        embedder_revision=embedder.revision,
        config=config,
        pictures=tuple(Picture.of(cell) for cell in cells),
        notes=_notes(measured, references),
        folder=folder,
        base_precision=base_precision,
    )
    write_atomic(folder / VECTORS_FILE, save(vectors))
    scores.save(folder)
    return scores


def score_checkpoint(
    base: Base,
    dataset: DatasetVersion,
    config: ScoringConfig,
    embedder: Embedder,
    base_scores: BaseScores,
    checkpoint_dir: Path,
) -> Score:
    """Score the adapter that is on `base` now; pictures and `scores.json` go to `checkpoint_dir`.

    Raises RuntimeError if no adapter is on the base, ValueError if `base_scores` belong to another
    base, dataset, config or embedder.
    """
    if not is_attached(base):
        raise RuntimeError("no adapter is on the base; there is nothing to score")
    wanted = scoring_key(base, dataset, config, embedder, base_scores.base_precision)
    if base_scores.base_key != wanted:
        raise ValueError(
            f"{base_scores.folder}: the base's scores belong to another base, dataset version, "
            "scoring config or embedder"
        )
    cells = plan_cells(config, dataset.trigger, dataset.class_word)
    (checkpoint_dir / SCORES_FILE).unlink(missing_ok=True)  # its pictures are replaced now
    vectors = _draw_and_embed(base, config, cells, embedder, checkpoint_dir)
    shared = base_scores.model_dump(
        include={"base_key", "references", "reference_count", "embedder", "embedder_revision"}
    )
    score = Score(
        **_measure(vectors, base_scores.vectors(), config, cells),
        **shared,
        config=config,
        pictures=base_scores.pictures,
        notes=base_scores.notes,
    )
    score.save(checkpoint_dir)
    return score


def existing_score(checkpoint_dir: Path, base_scores: BaseScores) -> Score | None:
    """The score in `checkpoint_dir`; None if there is none, or none comparable to `base_scores`."""
    try:
        score = Score.load(checkpoint_dir)
    except UserError:
        return None
    return score if score.base_key == base_scores.base_key else None


def _complete(folder: Path) -> BaseScores | None:
    """The base's scores in `folder`; None when absent or unreadable (they are then made again)."""
    try:
        scores = BaseScores.load(folder)
        scores.vectors()
    except (UserError, OSError, SafetensorError):
        return None
    whole = all((folder / picture.file).is_file() for picture in scores.pictures)
    return scores if whole else None


def _draw_and_embed(
    base: Base, config: ScoringConfig, cells: Sequence[Cell], embedder: Embedder, folder: Path
) -> dict[str, Floats]:
    """Make the pictures of all cells, store them, and return their embeddings by kind."""
    size_px = config.size_px or base.native_size_px
    pixels = sample(
        base,
        [cell.prompt for cell in cells],
        [cell.seed for cell in cells],
        steps=config.steps,
        guidance=config.guidance,
        size_px=size_px,
        batch=images_per_batch(size_px),
        negative=config.negative,
    )
    images = [Image.fromarray(picture) for picture in pixels]
    for cell, image in zip(cells, images, strict=True):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        write_atomic(folder / Picture.of(cell).file, buffer.getvalue())
    vectors = measures.unit_rows(embedder.embed_images(images), "image embeddings")
    kinds = np.array([cell.kind for cell in cells])
    return {kind: vectors[kinds == kind] for kind in Kinds}


def _embed_samples(samples: Sequence[Sample], size_px: int, embedder: Embedder) -> Floats:
    """The dataset's pictures as squares are trained: upright, centre square, same size."""
    images = []
    for picture in samples:
        pixels = (read_pixels(picture.path, size_px) + 1) * 127.5  # (3, H, W)
        array = pixels.round().clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)
        images.append(Image.fromarray(array))
    return measures.unit_rows(embedder.embed_images(images), "image embeddings")


def _measure(
    vectors: Mapping[str, Floats],
    base: Mapping[str, Floats],
    config: ScoringConfig,
    cells: Sequence[Cell],
) -> dict[str, Any]:
    """All measures of the pictures `vectors` against the base's; formulas at scores.Measured."""

    def mean(values: Floats) -> Interval:
        # The same draws for every set of one size: checkpoints are resampled alike.
        counts = measures.resample_counts(len(values), config.bootstrap, config.bootstrap_seed)
        return measures.mean_interval(values, counts)

    references, subject = base["references"], vectors["subject"]
    likeness = measures.reference_similarity(subject, references)
    raw = mean(likeness)
    base_raw = mean(measures.reference_similarity(base["subject"], references))
    floor = base_raw.value
    ceiling = measures.leave_one_out_similarity(references)
    identity_normalised = ceiling - floor >= MIN_SPAN
    span = ceiling - floor if identity_normalised else 1.0
    moved = measures.reference_similarity(
        vectors["class_word"], references
    ) - measures.reference_similarity(base["class_word"], references)

    own = [cell.prompt_index for cell in cells if cell.kind == "subject"]
    margins = measures.prompt_margins(subject, base["prompts"], own)
    base_margins = measures.prompt_margins(base["subject"], base["prompts"], own)
    fidelity_normalised = bool(base_margins.mean() >= MIN_SPAN)
    fidelity_span = float(base_margins.mean()) if fidelity_normalised else 1.0

    counts = measures.resample_counts(len(subject), config.bootstrap, config.bootstrap_seed)
    distances = measures.pairwise_distances(subject)
    return {
        "identity": raw.scaled(1 / span, -floor / span),
        "identities": tuple(((likeness - floor) / span).tolist()),
        "prompt_fidelity": mean(margins - base_margins).scaled(1 / fidelity_span, 1.0),
        "drift": mean(measures.paired_distances(vectors["unrelated"], base["unrelated"])),
        "leak": mean(moved).scaled(1 / span),
        "memorisation": mean(measures.copied(subject, base["train"])),
        "diversity": measures.pairwise_interval(distances, counts),
        "identity_raw": raw,
        "prompt_cosine": mean(measures.prompt_cosines(subject, base["prompts"], own)),
        "base_identity": base_raw.scaled(1 / span, -floor / span),
        "floor": floor,
        "ceiling": ceiling,
        "identity_normalised": identity_normalised,
        "prompt_fidelity_normalised": fidelity_normalised,
    }


def _notes(measured: Mapping[str, Any], references: References) -> tuple[str, ...]:
    """What limits the trust in these scores, in sentences."""
    notes = []
    if references.source == "train":
        notes.append(
            f"Fewer than {MIN_HOLDOUT_REFERENCES} pictures are held out, so identity compares with "
            "the training pictures and favours copies of them."
        )
    if not measured["identity_normalised"]:
        notes.append(
            f"Identity is not normalised: the base's pictures are as near to the references "
            f"({measured['floor']:.3f}) as those are to each other ({measured['ceiling']:.3f}), so "
            "this embedder hardly tells the character apart. Try another embedder, or more uniform "
            "pictures."
        )
    if not measured["prompt_fidelity_normalised"]:
        notes.append(
            "Prompt fidelity is not normalised: to this embedder the base's own pictures do not "
            "match their prompts."
        )
    return tuple(notes)

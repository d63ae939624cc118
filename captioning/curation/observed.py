"""What the models said about a picture, put together for the checks.

Images and stored observations in, one value for each image out; no model is called. What was not
observed is None, and the checks that need it say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from captioning.intake import Image
from captioning.lexicon import lexicon
from captioning.observations import Box, Observation, Quality, load_observations
from captioning.store import Store


@dataclass(frozen=True)
class Observed:
    """An image with the newest good answer of each kind."""

    image: Image
    tags: Mapping[str, float] | None = None  # names with spaces
    quality: Quality | None = None
    embedding: tuple[float, ...] | None = None  # length 1
    embedder: str = ""  # model@revision: embeddings of different models are never compared
    boxes: tuple[Box, ...] | None = None
    tagger: str = ""  # the model of the tags, for its own threshold

    @property
    def where(self) -> str:
        """What findings about it name: its sha256."""
        return self.image.sha256

    @property
    def short_side(self) -> int:
        """In px, of the upright picture."""
        return min(self.image.width, self.image.height)

    def accepted(self, threshold: float | None = None) -> dict[str, float]:
        """The tags that count, with their scores; without `threshold` by the tagger's own."""
        least = lexicon().threshold(self.tagger) if threshold is None else threshold
        return {tag: score for tag, score in (self.tags or {}).items() if score >= least}


def load_observed(store: Store, images: list[Image]) -> list[Observed]:
    """The images in their order, each with what was observed about it so far."""
    return [_observed(image, load_observations(store, image.sha256)) for image in images]


def _observed(image: Image, observations: list[Observation]) -> Observed:
    """Oldest first, so that the newest answer of a kind is the one that stays."""
    newest = {seen.kind: seen for seen in observations if seen.error is None}
    tags, quality = newest.get("tags"), newest.get("quality")
    embedding, boxes = newest.get("embedding"), newest.get("boxes")
    return Observed(
        image,
        {tag.replace("_", " "): score for tag, score in (tags.tags or {}).items()}
        if tags
        else None,
        quality.quality if quality else None,
        embedding.embedding if embedding else None,
        f"{embedding.model}@{embedding.revision}" if embedding else "",
        boxes.boxes if boxes else None,
        tags.model if tags else "",
    )


def embedded(pictures: list[Observed]) -> tuple[list[Observed], np.ndarray]:
    """The pictures embedded by the embedder that most were, and their embeddings (N, D)."""
    names = sorted({picture.embedder for picture in pictures if picture.embedding is not None})
    if not names:
        return [], np.zeros((0, 0))
    most = max(names, key=lambda name: sum(picture.embedder == name for picture in pictures))
    chosen = [p for p in pictures if p.embedding is not None and p.embedder == most]
    return chosen, np.array([picture.embedding for picture in chosen], np.float64)

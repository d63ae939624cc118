"""Which captions fit their pictures least, by CLIP: what rules and lint cannot see.

Stored picture embeddings and captions in, the least alike out. A score of one picture says little,
since models differ in their scale: only the order within a set counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from captioning.character import Character
from captioning.curation.observed import Observed
from captioning.observations import ProgressCallback

LOWEST_SHARE = 0.1  # of the set, to be read first
BATCH = 64


class TextEmbedder(Protocol):
    """The text side of the model that embedded the pictures."""

    id: str
    revision: str

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """float32 (N, D), each row of length 1."""
        ...


def least_alike(
    pictures: Sequence[Observed],
    captions: Mapping[str, str],
    character: Character,
    embedder: TextEmbedder,
    progress: ProgressCallback | None = None,
) -> dict[str, float]:
    """sha256 and cosine of the tenth of the pictures whose captions are least like them.

    Only pictures that this very model embedded count; with fewer than ten of them the answer is
    empty. The trigger, a word that no CLIP knows, is left out of the captions.
    """
    by = f"{embedder.id}@{embedder.revision}"
    chosen = [one for one in pictures if one.embedder == by and one.where in captions]
    count = int(LOWEST_SHARE * len(chosen))
    if not count:
        return {}
    texts = [captions[one.where].removeprefix(character.trigger).lstrip(", ") for one in chosen]
    rows = []
    for part in _parts(texts):
        rows.append(embedder.embed_texts(part))
        if progress:
            progress(sum(map(len, rows)), len(texts))
    vectors = np.array([one.embedding for one in chosen], np.float64)  # (N, D)
    cosines = (vectors * np.concatenate(rows)).sum(1).round(3)
    order = sorted(range(len(chosen)), key=lambda row: (cosines[row], chosen[row].where))
    return {chosen[row].where: float(cosines[row]) for row in order[:count]}


def _parts(texts: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), BATCH):
        yield texts[start : start + BATCH]

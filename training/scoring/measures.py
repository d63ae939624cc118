"""The measures of a score as plain numpy: unit embeddings in, numbers with intervals out.

Rows are pictures (or texts), unit length, so a dot product is a cosine. Every function is pure and
deterministic. Nothing here knows a model, a file or a prompt's words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Floats = NDArray[np.float64]

CONFIDENCE_PERCENT = 95.0
# A picture counts as copied when it is nearer to a training picture than this share of the training
# pictures are to their own nearest neighbour. Below 1 so that one pair of near-duplicates in the
# set does not hide every copy.
MEMORISATION_QUANTILE = 0.9
# Embedders return float32; a row further than this from unit length is a caller's mistake.
UNIT_TOLERANCE = 1e-3


class Interval(BaseModel):
    """A value and the bounds of its percentile bootstrap interval of `CONFIDENCE_PERCENT`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def scaled(self, factor: float, offset: float = 0.0) -> Interval:
        """`factor · x + offset` of value and bounds; `factor` > 0."""
        return Interval(
            value=self.value * factor + offset,
            low=self.low * factor + offset,
            high=self.high * factor + offset,
        )


def unit_rows(rows: object, name: str) -> Floats:
    """`rows` as float64 (N, D), renormalised exactly.

    Raises ValueError naming `name` if it is no matrix, is empty, not finite, or its rows are not
    of unit length.
    """
    matrix = np.asarray(rows, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] == 0:
        raise ValueError(f"{name}: expected (N, D) with N >= 1, found shape {matrix.shape}")
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)  # (N, 1)
    if not np.all(np.abs(lengths - 1) < UNIT_TOLERANCE):  # also false for NaN
        raise ValueError(f"{name}: rows are not of unit length (found {lengths.ravel()[:4]})")
    return matrix / lengths


def resample_counts(count: int, resamples: int, seed: int) -> Floats:
    """How often each of `count` pictures is drawn in each bootstrap sample.  # (B, N)

    Efron's bootstrap: N draws with replacement. The same arguments give the same draws, so that
    all checkpoints of a sweep are resampled alike.
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)


def mean_interval(values: Floats, counts: Floats) -> Interval:
    """Mean of `values` (N,) with the percentile interval over the resamples `counts` (B, N)."""
    return _interval(float(values.mean()), counts @ values / len(values))


def tells_apart(higher: Floats, lower: Floats, counts: Floats) -> bool:
    """Whether the mean of `higher` (N,) is above that of `lower` (N,) with confidence.

    Paired: row n of both is the same prompt and noise, so what a prompt adds to both cancels out
    and the percentile interval of the mean difference says more than two intervals side by side.
    """
    return mean_interval(higher - lower, counts).low > 0


def pairwise_interval(distances: Floats, counts: Floats) -> Interval:
    """Mean over pairs of different pictures of a symmetric matrix (N, N), with its interval.

    In a resample a picture that was drawn twice makes no pair with itself: such pairs have distance
    0 and would pull the interval down. One picture alone has no pair: 0, with an empty interval.
    """
    count = len(distances)
    if count < 2:
        return Interval(value=0.0, low=0.0, high=0.0)
    value = float(distances[~np.eye(count, dtype=bool)].mean())
    totals = np.einsum("bi,ij,bj->b", counts, distances, counts)  # the diagonal is 0
    pairs = counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)  # (B,)
    usable = pairs > 0  # a resample of one picture N times says nothing about pairs
    if not usable.any():
        return Interval(value=value, low=value, high=value)
    return _interval(value, totals[usable] / pairs[usable])


def _interval(value: float, resampled: Floats) -> Interval:
    tail = (100 - CONFIDENCE_PERCENT) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(value=value, low=float(low), high=float(high))


def reference_similarity(images: Floats, references: Floats) -> Floats:
    """Mean cosine of every picture to all references (CLIP-I of Ruiz et al. 2023).  # (N,)"""
    return (images @ references.T).mean(axis=1)


def leave_one_out_similarity(references: Floats) -> float:
    """Mean over references of the mean cosine to all the other references.

    What a perfect picture of the subject would reach. Raises ValueError for fewer than two.
    """
    count = len(references)
    if count < 2:
        raise ValueError(f"leave-one-out needs at least 2 references, found {count}")
    cosines = references @ references.T
    return float(cosines[~np.eye(count, dtype=bool)].mean())


def prompt_cosines(images: Floats, texts: Floats, own: Sequence[int]) -> Floats:
    """Cosine of every picture to the text it was asked for, `texts[own[i]]`.  # (N,)"""
    return np.einsum("nd,nd->n", images, texts[np.asarray(own)])


def prompt_margins(images: Floats, texts: Floats, own: Sequence[int]) -> Floats:
    """How much nearer every picture is to its own text than to the other texts.  # (N,)

    cos(image, own text) - mean cosine to the P - 1 other texts. 0: the picture ignores its prompt.
    What moves all cosines alike (a drawing style that the embedder does not know) cancels out.
    Raises ValueError for fewer than two texts.
    """
    others = len(texts) - 1
    if others < 1:
        raise ValueError("prompt margins need at least 2 different prompts")
    matched = prompt_cosines(images, texts, own)
    return matched - ((images @ texts.T).sum(axis=1) - matched) / others


def paired_distances(images: Floats, others: Floats) -> Floats:
    """1 - cosine between the rows of two equally long sets.  # (N,)"""
    return 1 - np.einsum("nd,nd->n", images, others)


def pairwise_distances(images: Floats) -> Floats:
    """1 - cosine between all pictures; exactly 0 on the diagonal.  # (N, N)"""
    distances = 1 - images @ images.T
    np.fill_diagonal(distances, 0.0)
    return distances


def copied(images: Floats, training: Floats) -> Floats:
    """1.0 for every picture that is nearer to one training picture than those are to each other.

    Its largest cosine to a training picture is above the `MEMORISATION_QUANTILE` quantile of the
    training pictures' cosines to their own nearest neighbour; a global form of the authenticity
    test of Alaa et al. 2022, section 3.3.  # (N,)  Raises ValueError for fewer than two training
    pictures.
    """
    count = len(training)
    if count < 2:
        raise ValueError(f"memorisation needs at least 2 training pictures, found {count}")
    among = training @ training.T
    np.fill_diagonal(among, -np.inf)
    limit = np.quantile(among.max(axis=1), MEMORISATION_QUANTILE)
    return ((images @ training.T).max(axis=1) > limit).astype(float)

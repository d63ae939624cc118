"""Pictures that are there twice: the same pixels, the same picture, or perhaps the same.

Exact by the hash of the pixels, near by perceptual hash or by pixels that fit (mirrored and
cropped copies, which the embedding proposes). Of a group the best stays, never simply the first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import combinations
from typing import Literal

import numpy as np

from captioning.curation.limits import CurationLimits
from captioning.curation.observed import Observed, embedded
from captioning.curation.same_picture import LOOK_BELOW, SAME_BELOW, UNLIKE
from captioning.findings import Finding

Pair = tuple[int, int]  # rows of the pictures, the smaller first
# (sha256, sha256) -> how far the pixels differ where they fit best, see `same_picture.difference`
Difference = Callable[[str, str], float]
# Effective sides closer than this count as equal: they are measured in coarse steps.
SIDE_TOLERANCE = 1.3
# JPEG's noise looks like sharpness.
SHARPNESS_TOLERANCE = 1.1
# Under this cosine a hash that agrees is chance: a drawing with another expression keeps more.
LOOK_COSINE = 0.90
LOSSLESS = ("PNG", "TIFF", "BMP")


def duplicate_findings(
    pictures: list[Observed], limits: CurationLimits, difference: Difference | None = None
) -> list[Finding]:
    """IMG230 exact and IMG231 near copies of a better picture, IMG232 pairs to look at.

    Without `difference` no mirrored or cropped copy is sought. IMG230 and IMG231 stand at every
    picture of a group but the best, which is the first of their `others`.
    """
    exact = _exact(pictures)
    cosines = _near_embeddings(pictures, limits)
    bits = _near_hashes(pictures, limits.review_bits)
    if difference is not None:
        # A hash can agree by chance where the embedding says that they are far apart.
        embeds = {picture.where for picture in embedded(pictures)[0]}
        known = {row for row, picture in enumerate(pictures) if picture.where in embeds}
        bits = {
            pair: n for pair, n in bits.items() if pair in cosines or not known.issuperset(pair)
        }
    near: dict[Pair, str] = {}
    review: dict[Pair, str] = {}
    for pair in sorted((bits.keys() | cosines.keys()) - exact):
        one, other = (pictures[row] for row in pair)
        apart = difference(one.where, other.where) if difference and pair in cosines else None
        verdict = _verdict(bits.get(pair, 64), cosines.get(pair, -1.0), apart, limits)
        if verdict == "near":
            near[pair] = _in_words(bits.get(pair), cosines.get(pair))
        elif verdict == "look":
            review[pair] = _in_words(bits.get(pair), cosines.get(pair))
    groups = _groups(len(pictures), [*exact, *near])
    found = []
    grouped: dict[int, int] = {}
    for number, group in enumerate(groups):
        best = best_of([pictures[row] for row in group])
        for row in group:
            grouped[row] = number
            if pictures[row] is not best:
                found.append(_copy(pictures, row, group, best, exact, near))
    # A pair inside a group was decided with the group.
    open_pairs = [p for p in review if p[0] not in grouped or grouped[p[0]] != grouped.get(p[1])]
    return found + [_look(pictures, pair, review[pair]) for pair in open_pairs]


def _verdict(
    bits: int, cosine: float, apart: float | None, limits: CurationLimits
) -> Literal["near", "look", "other"]:
    """What two pictures are to each other; pixels decide where they were compared."""
    if apart is not None:
        if apart < SAME_BELOW:
            return "near"
        # A hash can agree by chance where not even the outlines fit.
        hashed = bits <= limits.near_bits and apart < UNLIKE and cosine >= LOOK_COSINE
        alike = hashed or (cosine >= limits.same_cosine and apart < LOOK_BELOW)
        return "look" if alike else "other"
    if bits <= limits.near_bits:
        return "near"
    return "look" if bits <= limits.review_bits or cosine >= limits.same_cosine else "other"


def best_of(pictures: list[Observed]) -> Observed:
    """The one to keep: most real pixels, then not enlarged, larger, clearly sharper, lossless.

    Equal ones are told apart by sha256, so that the order of intake decides nothing.
    """
    most = max(_effective(picture) for picture in pictures)
    rivals = [picture for picture in pictures if _effective(picture) * SIDE_TOLERANCE >= most]
    native = [one for one in rivals if one.quality is None or one.quality.effective_px is None]
    largest = max(native or rivals, key=_area)
    rivals = [one for one in native or rivals if _area(one) == _area(largest)]
    sharpest = max(_sharpness(one) for one in rivals)
    rivals = [one for one in rivals if _sharpness(one) * SHARPNESS_TOLERANCE >= sharpest]
    return max(rivals, key=lambda one: (one.image.format in LOSSLESS, _sharpness(one), one.where))


def _area(picture: Observed) -> int:
    return picture.image.width * picture.image.height


def _sharpness(picture: Observed) -> float:
    return picture.quality.sharpness if picture.quality else 0.0


def _effective(picture: Observed) -> int:
    real = picture.quality.effective_px if picture.quality else None
    return picture.short_side if real is None else min(real, picture.short_side)


def _exact(pictures: list[Observed]) -> set[Pair]:
    by_pixels: dict[str, list[int]] = defaultdict(list)
    for row, picture in enumerate(pictures):
        if picture.quality is not None:
            by_pixels[picture.quality.pixels_sha256].append(row)
    return {pair for rows in by_pixels.values() for pair in combinations(rows, 2)}


def _near_hashes(pictures: list[Observed], limit: int) -> dict[Pair, int]:
    """Bits that differ, of the pairs within the limit; blank pictures have no hash to speak of."""
    rows = [r for r, p in enumerate(pictures) if p.quality is not None and p.quality.contrast > 0]
    if not rows:
        return {}
    hashes = np.array([int(_hash(pictures[row]), 16) for row in rows], np.uint64)
    near = {}
    for place, row in enumerate(rows):
        bits = np.bitwise_count(hashes[place + 1 :] ^ hashes[place])
        for later in np.flatnonzero(bits <= limit):
            near[row, rows[place + 1 + int(later)]] = int(bits[later])
    return near


def _hash(picture: Observed) -> str:
    return picture.quality.phash if picture.quality else "0"


def _near_embeddings(pictures: list[Observed], limits: CurationLimits) -> dict[Pair, float]:
    """Cosines of each picture's nearest ones: what may be a mirrored or cropped copy."""
    chosen, vectors = embedded(pictures)
    place = {picture.where: row for row, picture in enumerate(pictures)}
    near: dict[Pair, float] = {}
    for one, picture in enumerate(chosen):
        cosines = vectors @ vectors[one]  # (N,)
        cosines[one] = -1.0
        for other in np.argsort(-cosines, kind="stable")[: limits.candidates]:
            if cosines[other] >= limits.candidate_cosine:
                rows = sorted((place[picture.where], place[chosen[int(other)].where]))
                near[rows[0], rows[1]] = float(cosines[other])
    return near


def _groups(count: int, pairs: list[Pair]) -> list[list[int]]:
    """Rows that pairs join, two or more each, by union-find."""
    parent = list(range(count))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for one, other in pairs:
        parent[max(root(one), root(other))] = min(root(one), root(other))
    joined: dict[int, list[int]] = defaultdict(list)
    for row in range(count):
        joined[root(row)].append(row)
    return [rows for rows in joined.values() if len(rows) > 1]


def _copy(
    pictures: list[Observed],
    row: int,
    group: list[int],
    best: Observed,
    exact: set[Pair],
    near: dict[Pair, str],
) -> Finding:
    twins = [other for other in group if (min(row, other), max(row, other)) in exact]
    said = [near[pair] for other in group if (pair := (min(row, other), max(row, other))) in near]
    others = [pictures[other].where for other in group if pictures[other].where != best.where]
    others.remove(pictures[row].where)
    # An exact copy of one that is itself only near to the best is a near copy of the best.
    is_exact = any(pictures[other] is best for other in twins)
    return Finding(
        code="IMG230" if is_exact else "IMG231",
        severity="warn",
        where=pictures[row].where,
        message=f"{'the same pixels' if is_exact else 'the same picture'} as {best.image.source}"
        + (f", {len(group)} in all" if len(group) > 2 else ""),
        value="equal pixels" if is_exact else said[0] if said else "a copy of a copy",
        limit=None,
        hint=f"drop it and keep {best.image.source}, the better one",
        others=(best.where, *others),
    )


def _look(pictures: list[Observed], pair: Pair, said: str) -> Finding:
    one, other = (pictures[row] for row in pair)
    better = best_of([one, other])
    worse = other if better is one else one
    return Finding(
        code="IMG232",
        severity="info",
        where=worse.where,
        message=f"looks very much like {better.image.source}",
        value=said,
        limit=None,
        hint="look at both; drop one if it shows nothing that the other does not",
        others=(better.where,),
    )


def _in_words(bits: int | None, cosine: float | None) -> str:
    parts = [] if bits is None else [f"{bits} of 64 hash bits differ"]
    parts += [] if cosine is None else [f"cosine {cosine:.3f}"]
    return ", ".join(parts)

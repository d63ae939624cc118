"""Pictures unlike the rest: another style by embedding and tones, another identity by the traits.

Distances to the medoid (the picture nearest to all) against their own spread. Never a reason to
drop by itself: users' guides disagree about one style, and an outlier may be the best picture.
"""

from __future__ import annotations

import numpy as np

from captioning.curation.limits import CurationLimits
from captioning.curation.observed import Observed, embedded
from captioning.findings import Finding
from captioning.lexicon import lexicon

# A median absolute deviation times this is the standard deviation of a normal distribution.
MAD_TO_SIGMA = 1.4826
# The least share of the set's pictures that must have a trait for it to count as the character's.
SHARED_TRAIT = 0.5


def outlier_findings(pictures: list[Observed], limits: CurationLimits) -> list[Finding]:
    """IMG220 style outliers by embedding or tones, IMG221 identity outliers by traits in tags."""
    chosen, vectors = embedded(pictures)
    tagged, traits = _traits(pictures, limits)
    measured = [picture for picture in pictures if picture.quality is not None]
    bits = np.array([picture.quality.entropy_bits for picture in measured if picture.quality])
    unlike = _far(
        chosen, 1 - vectors @ vectors.T, limits, limits.style_distance, "IMG220",
        "looks unlike the other pictures: another style, or hardly the character",
        "look at it; drop it unless the adapter shall know this style too",
    )  # fmt: skip
    toned = _far(
        measured, np.abs(bits[:, None] - bits[None, :]), limits, limits.style_bits, "IMG220",
        "other tones than the other pictures: painted or a photo among flat drawings, or flat "
        "among those",
        "look at it; drop it unless the adapter shall know this style too",
    )  # fmt: skip
    named = {found.where for found in unlike}
    return [
        *unlike,
        *(found for found in toned if found.where not in named),
        *_far(
            tagged, _pairwise(traits), limits, limits.identity_distance, "IMG221",
            "its tags describe somebody else",
            "look whether it is the character; a costume or a dyed wig is worth a caption",
            traits_of=True,
        ),
    ]  # fmt: skip


def _far(
    pictures: list[Observed],
    distances: np.ndarray,
    limits: CurationLimits,
    least: float,
    code: str,
    message: str,
    hint: str,
    traits_of: bool = False,
) -> list[Finding]:
    """Findings for the pictures too far from the medoid; `distances` is (N, N)."""
    if len(pictures) < limits.outlier_min_pictures or not distances.any():
        return []
    medoid = int(distances.sum(1).argmin())
    away = distances[medoid]
    usual = float(np.median(away))
    spread = MAD_TO_SIGMA * float(np.median(np.abs(away - usual)))
    limit = max(least, usual + limits.outlier_spreads * spread)
    shared = _shared_traits(pictures, limits) if traits_of else frozenset()
    return [
        Finding(
            code=code,
            severity="warn",
            where=picture.where,
            message=message + (f" ({_unlike(picture, shared, limits)})" if traits_of else ""),
            value=round(float(distance), 3),
            limit=round(limit, 3),
            hint=hint,
            others=(pictures[medoid].where,),
        )
        for picture, distance in zip(pictures, away, strict=True)
        if distance > limit
    ]


def _traits(pictures: list[Observed], limits: CurationLimits) -> tuple[list[Observed], np.ndarray]:
    """The tagged pictures and their scores (N, T) of all traits of identity accepted anywhere."""
    group = lexicon().group
    tagged = [picture for picture in pictures if picture.tags]
    names = sorted({t for p in tagged for t in p.accepted(limits.tag_threshold) if group(t).trait})
    rows = [[(picture.tags or {}).get(name, 0.0) for name in names] for picture in tagged]
    return tagged, np.array(rows, np.float64).reshape(len(tagged), len(names))


def _pairwise(traits: np.ndarray) -> np.ndarray:
    """Half the sum of absolute differences, (N, N): 1 when one trait stands for another."""
    return np.array([np.abs(traits - row).sum(1) / 2 for row in traits]).reshape(
        len(traits), len(traits)
    )


def _shared_traits(pictures: list[Observed], limits: CurationLimits) -> frozenset[str]:
    counts: dict[str, int] = {}
    for picture in pictures:
        for tag in picture.accepted(limits.tag_threshold):
            counts[tag] = counts.get(tag, 0) + lexicon().group(tag).trait
    return frozenset(tag for tag, count in counts.items() if count >= SHARED_TRAIT * len(pictures))


def _unlike(picture: Observed, shared: frozenset[str], limits: CurationLimits) -> str:
    own = picture.accepted(limits.tag_threshold)
    extra = sorted(tag for tag in own if lexicon().group(tag).trait and tag not in shared)
    lacking = sorted(shared - own.keys())
    parts = [f"it has {', '.join(extra)}"] if extra else []
    return "; ".join(parts + ([f"it lacks {', '.join(lacking)}"] if lacking else []))

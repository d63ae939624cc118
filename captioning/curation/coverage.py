"""Which views of the character the set has: framing by signed direction, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from captioning.curation.observed import Observed
from captioning.findings import DATASET, Finding
from captioning.framing import (
    ACCEPTED,
    DIRECTIONS,
    FRAMINGS,
    Direction,
    Framing,
    direction_of,
    framing_of,
    side_unsigned,
)

Cell = tuple[Framing, Direction]
# The guide for Flux captions asks for two or three close-ups from the front and from each side,
# then waist-up and full body; these are the smallest numbers that it names.
WANTED: Mapping[Cell, int] = {
    ("close-up", "front"): 2,
    ("close-up", "left"): 2,
    ("close-up", "right"): 2,
    ("upper", "front"): 2,
    ("full", "front"): 2,
}
# When the tagger tells no direction, a framing needs what its directions together need.
WANTED_FRAMINGS: Mapping[Framing, int] = {"close-up": 6, "upper": 2, "full": 2}
_SEEN_FROM = {
    "front": "from the front",
    "left": "in left profile",
    "right": "in right profile",
    "back": "from behind",
}
_SHOWING = {"close-up": "close-up", "upper": "upper body", "full": "full body"}


@dataclass(frozen=True)
class Coverage:
    """How many pictures there are of each view, and what is missing in words."""

    counts: Mapping[Cell, int]  # of pictures whose framing and direction are both known
    framing_only: Mapping[Framing, int]  # direction not told, or a side that no tag signs
    unsigned_sides: int
    unknown: int  # no framing told
    directions_told: bool  # whether any picture has a direction
    missing: tuple[str, ...]

    def total(self, framing: Framing) -> int:
        """Pictures of one framing, whatever the direction."""
        signed = sum(self.counts[framing, way] for way in DIRECTIONS)
        return signed + self.framing_only[framing]


def coverage(tags: Iterable[Mapping[str, float]], threshold: float = ACCEPTED) -> Coverage:
    """Count the views in the pictures' tag scores; tagged pictures only."""
    counts = {(framing, way): 0 for framing in FRAMINGS for way in DIRECTIONS}
    framing_only = dict.fromkeys(FRAMINGS, 0)
    unsigned = unknown = directed = 0
    for scores in tags:
        framing, way = framing_of(scores, threshold), direction_of(scores, threshold)
        unsigned += side_unsigned(scores, threshold)
        directed += way is not None
        if framing is None:
            unknown += 1
        elif way is None:
            framing_only[framing] += 1
        else:
            counts[framing, way] += 1
    told = directed + unsigned > 0
    missing = _missing_cells(counts) if told else _missing_framings(framing_only)
    known = sum(counts.values()) + sum(framing_only.values())
    return Coverage(counts, framing_only, unsigned, unknown, told, tuple(missing if known else ()))


def coverage_of(pictures: list[Observed], threshold: float | None) -> Coverage:
    """The coverage of the pictures that were tagged; `threshold` as in `Observed.accepted`."""
    tagged = (picture.accepted(threshold) for picture in pictures if picture.tags is not None)
    return coverage(tagged, 0.0)


def coverage_findings(found: Coverage) -> list[Finding]:
    """IMG250: one for each view that is missing."""
    return [
        Finding(
            code="IMG250",
            severity="info",
            where=DATASET,
            message=f"missing: {words}",
            value=words,
            limit=None,
            hint="add such pictures if there are any; the adapter guesses views it never saw",
        )
        for words in found.missing
    ]


def _missing_cells(counts: Mapping[Cell, int]) -> list[str]:
    lacking = [
        (framing, way, wanted - counts[framing, way]) for (framing, way), wanted in WANTED.items()
    ]
    return [
        f"{count} more {_plural(framing, count)} {_SEEN_FROM[way]}"
        for framing, way, count in lacking
        if count > 0
    ]


def _missing_framings(counts: Mapping[Framing, int]) -> list[str]:
    lacking = [(framing, wanted - counts[framing]) for framing, wanted in WANTED_FRAMINGS.items()]
    return [f"{count} more {_plural(framing, count)}" for framing, count in lacking if count > 0]


def _plural(framing: Framing, count: int) -> str:
    if count == 1:
        return f"{_SHOWING[framing]} picture"
    return f"{_SHOWING[framing]} pictures"

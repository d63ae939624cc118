"""The set as a whole: enough pictures, a mix of framings, and not one outfit in all of them."""

from __future__ import annotations

import math
from collections import Counter

from captioning.curation.limits import CurationLimits
from captioning.curation.observed import Observed
from captioning.findings import DATASET, Finding, Severity
from captioning.framing import framing_of
from captioning.lexicon import lexicon

# These should change from picture to picture; else the trigger learns them.
VARIED_SLOTS = ("expression", "gaze", "pose", "outfit", "background", "light")
# When fewer pictures than this say anything about a slot, its shares mean little.
MIN_PICTURES_SAYING = 8


def variety_findings(
    pictures: list[Observed], limits: CurationLimits, redundant: int = 0
) -> list[Finding]:
    """IMG240 and IMG241 too few, IMG242 framing mix, IMG243 the same value again and again.

    `redundant` of the pictures don't count: copies, and what can't be used.
    """
    return [
        *_count(len(pictures) - redundant, redundant, limits),
        *_close_ups(pictures, limits),
        *_monotony(pictures, limits),
    ]


def _count(count: int, redundant: int, limits: CurationLimits) -> list[Finding]:
    if count >= limits.warn_pictures:
        return []
    code, severity, limit = ("IMG241", "warn", limits.warn_pictures)
    if count < limits.block_pictures:
        code, severity, limit = ("IMG240", "block", limits.block_pictures)
    rest = f", {redundant} copies and unusable ones not counted" if redundant else ""
    return [
        _about_all(
            code,
            "block" if severity == "block" else "warn",
            f"{count} {'picture' if count == 1 else 'pictures'}{rest}",
            count,
            limit,
            "add pictures: 20 to 30 different ones train well",
        )
    ]


def _close_ups(pictures: list[Observed], limits: CurationLimits) -> list[Finding]:
    framings = [framing_of(picture.accepted(limits.tag_threshold), 0.0) for picture in pictures]
    known = [framing for framing in framings if framing is not None]
    if len(known) < MIN_PICTURES_SAYING:
        return []
    share = known.count("close-up") / len(known)
    low, high = limits.close_up_share
    if low <= share <= high:
        return []
    few = share < low
    return [
        _about_all(
            "IMG242",
            "info",
            f"{share:.0%} of the pictures show head and shoulders only",
            round(share, 3),
            f"{low:.0%} to {high:.0%}",
            "add close-ups: they teach the face"
            if few
            else "add upper and full bodies: they teach outfit and build",
        )
    ]


def _monotony(pictures: list[Observed], limits: CurationLimits) -> list[Finding]:
    found = []
    for slot in VARIED_SLOTS:
        values = [_values(picture, slot, limits) for picture in pictures]
        saying = [value for value in values if value]
        if len(saying) < max(MIN_PICTURES_SAYING, math.ceil(limits.one_value_share * len(values))):
            continue
        counts = Counter(tag for tags in saying for tag in tags)
        tag, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
        share = count / len(values)
        if share > limits.one_value_share:
            found.append(
                _about_all(
                    "IMG243",
                    "warn",
                    f"{slot}: {tag!r} on {count} of {len(values)} pictures "
                    f"(variety {_bits(counts):.1f} bits)",
                    round(share, 3),
                    limits.one_value_share,
                    f"add pictures with another {slot}; what never changes becomes part of the "
                    "character",
                )
            )
    return found


def _values(picture: Observed, slot: str, limits: CurationLimits) -> list[str]:
    group = lexicon().group
    return [tag for tag in picture.accepted(limits.tag_threshold) if group(tag).slot == slot]


def _bits(counts: Counter[str]) -> float:
    """Shannon's entropy of the values: 0 when all are the same, 1 for two in equal parts."""
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values()) + 0.0


def _about_all(
    code: str, severity: Severity, message: str, value: float, limit: float | str, hint: str
) -> Finding:
    return Finding(
        code=code,
        severity=severity,
        where=DATASET,
        message=message,
        value=value,
        limit=limit,
        hint=hint,
    )

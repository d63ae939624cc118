"""Who is in the picture: one subject, its face to be seen, large enough, no writing over it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from captioning.curation.limits import CurationLimits
from captioning.curation.observed import Observed
from captioning.findings import Finding

# Danbooru's counting tags, and the words that other taggers use.
_SEVERAL = re.compile(
    r"([2-9]|\d+\+|multiple) ?(girls|boys|others|people|persons|women|men|views|characters)"
    r"|crowd|group|group shot|couple|everyone|siblings|twins"
)
_ONE_EACH = ("1girl", "1boy", "1other")
_COVERED = {
    "sunglasses", "mask", "face mask", "mouth mask", "gas mask", "surgical mask", "eye mask",
    "covering face", "covering own face", "covered face", "covered eyes", "covering own eyes",
    "hand over face", "faceless", "head out of frame", "face out of frame", "eyes out of frame",
    "blurry", "motion blur", "helmet", "blindfold", "veil over face",
}  # fmt: skip
_WRITTEN = {
    "watermark", "signature", "artist name", "web address", "text", "logo", "twitter username",
    "patreon username", "patreon logo", "username", "dated", "copyright name", "copyright notice",
    "speech bubble", "english text", "japanese text", "chinese text", "korean text", "subtitled",
    "sample watermark", "text focus",
}  # fmt: skip
_PERSON_BOXES = {"person", "face", "head"}


def subject_findings(pictures: list[Observed], limits: CurationLimits) -> list[Finding]:
    """IMG210 several subjects, IMG211 covered face, IMG212 small subject, IMG213 writing on it."""
    found: list[Finding] = []
    for picture in pictures:
        tags = picture.accepted(limits.tag_threshold)
        found += _several(picture, tags, limits)
        found += _tagged(
            picture, tags, _COVERED, "IMG211", "info", "the face or figure is covered or unclear",
            "keep few of these, and make sure that captions name what covers it",
        )  # fmt: skip
        found += _small(picture, limits)
        found += _tagged(
            picture, tags, _WRITTEN, "IMG213", "warn", "there is writing or a watermark on it",
            "paint it out or crop it off: the adapter would learn to draw it",
        )  # fmt: skip
    return found


def _several(picture: Observed, tags: dict[str, float], limits: CurationLimits) -> list[Finding]:
    named = [tag for tag in tags if _SEVERAL.fullmatch(tag)]
    mixed = [tag for tag in _ONE_EACH if tag in tags]
    counted = [
        sum(box.label == label and box.score >= limits.subject_boxes_score for box in boxes)
        for boxes in [picture.boxes or ()]
        for label in _PERSON_BOXES
    ]
    if not named and len(mixed) > 1 and "solo" not in tags:
        named = mixed
    if not named and max(counted, default=0) < 2:
        return []
    seen = ", ".join(sorted(named)) or f"{max(counted)} boxes"
    return [
        Finding(
            code="IMG210",
            severity="warn",
            where=picture.where,
            message=f"more than one subject ({seen})",
            value=seen,
            limit="one",
            hint="crop to the character, or drop it: the adapter would learn the others too",
        )
    ]


def _small(picture: Observed, limits: CurationLimits) -> list[Finding]:
    people = [
        box.width * box.height
        for box in picture.boxes or ()
        if box.label in ("person", "subject") and box.score >= limits.subject_boxes_score
    ]
    if not people or max(people) >= limits.subject_area:
        return []
    return [
        Finding(
            code="IMG212",
            severity="info",
            where=picture.where,
            message=f"the subject fills {max(people):.0%} of the picture",
            value=round(max(people), 3),
            limit=limits.subject_area,
            hint="crop closer where the background says nothing",
        )
    ]


def _tagged(
    picture: Observed,
    tags: dict[str, float],
    wanted: Iterable[str],
    code: str,
    severity: str,
    message: str,
    hint: str,
) -> list[Finding]:
    seen = ", ".join(sorted(tags.keys() & set(wanted)))
    if not seen:
        return []
    return [
        Finding.model_validate(
            {
                "code": code,
                "severity": severity,
                "where": picture.where,
                "message": f"{message} ({seen})",
                "value": seen,
                "limit": "none",
                "hint": hint,
            }
        )
    ]

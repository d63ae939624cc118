"""What changed between two dataset versions: images in and out, captions word by word, rules.

Pure: two versions in, a `VersionDiff` out. `marked` writes a changed caption for people.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from captioning.versions import DatasetVersion, ModelUsed, Sample

Piece = tuple[Literal["same", "out", "in"], str]


@dataclass(frozen=True)
class CaptionChange:
    """One image whose caption is another one; `pieces` are its words in order, old and new."""

    sha256: str
    source: str
    before: str
    after: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Changed:
    """One setting, by its dotted name, with None where it was not there."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class VersionDiff:
    """All differences; every field is empty when the versions are equal."""

    before: str
    after: str
    images_in: tuple[Sample, ...]
    images_out: tuple[Sample, ...]
    to_holdout: tuple[Sample, ...]
    to_train: tuple[Sample, ...]
    captions: tuple[CaptionChange, ...]
    settings: tuple[Changed, ...]  # trigger, class word and rules
    models_in: tuple[ModelUsed, ...]
    models_out: tuple[ModelUsed, ...]


def diff_versions(before: DatasetVersion, after: DatasetVersion) -> VersionDiff:
    """What has to be done to `before` to have `after`; samples in the order of their version."""
    old, new = _samples(before), _samples(after)
    held = {sample.sha256 for sample in before.holdout}
    held_now = {sample.sha256 for sample in after.holdout}
    stayed = [sample for sha256, sample in new.items() if sha256 in old]
    return VersionDiff(
        before.name,
        after.name,
        tuple(sample for sha256, sample in new.items() if sha256 not in old),
        tuple(sample for sha256, sample in old.items() if sha256 not in new),
        tuple(one for one in stayed if one.sha256 in held_now - held),
        tuple(one for one in stayed if one.sha256 in held - held_now),
        tuple(
            CaptionChange(
                sample.sha256,
                sample.source,
                old[sample.sha256].caption,
                sample.caption,
                tuple(word_changes(old[sample.sha256].caption, sample.caption)),
            )
            for sample in stayed
            if sample.caption != old[sample.sha256].caption
        ),
        tuple(_settings(before, after)),
        tuple(model for model in after.models if model not in before.models),
        tuple(model for model in before.models if model not in after.models),
    )


def word_changes(before: str, after: str) -> list[Piece]:
    """Two captions as runs of words that stayed, went out or came in.

    A comma is a word of its own. The pieces that are not `in`, joined, are the old caption up to
    white space; those that are not `out` the new one.
    """
    old, new = _words(before), _words(after)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    pieces: list[Piece] = []
    for _, start, end, new_start, new_end in matcher.get_opcodes():
        if old[start:end] == new[new_start:new_end]:
            pieces.append(("same", _text(old[start:end])))
            continue
        if start < end:
            pieces.append(("out", _text(old[start:end])))
        if new_start < new_end:
            pieces.append(("in", _text(new[new_start:new_end])))
    return pieces


# git's word diff.
PLAIN_MARKS = {"same": "{}", "out": "[-{}-]", "in": "{{+{}+}}"}


def marked(pieces: Iterable[Piece], marks: Mapping[str, str] = PLAIN_MARKS) -> str:
    """The pieces on one line, what went out as `[-red-]` and what came in as `{+blue+}`."""
    line = " ".join(marks[kind].format(text) for kind, text in pieces)
    return line.replace(" ,", ",")


def _words(caption: str) -> list[str]:
    return re.findall(r",|[^\s,]+", caption)


def _text(words: list[str]) -> str:
    return " ".join(words).replace(" ,", ",")


def _samples(version: DatasetVersion) -> dict[str, Sample]:
    return {sample.sha256: sample for sample in (*version.train, *version.holdout)}


def _settings(before: DatasetVersion, after: DatasetVersion) -> list[Changed]:
    old, new = (
        {"trigger": one.trigger, "class_word": one.class_word} | _flat("rules", one.rules)
        for one in (before, after)
    )
    names = [*old, *(name for name in new if name not in old)]
    return [
        Changed(name, old.get(name), new.get(name))
        for name in names
        if old.get(name) != new.get(name)
    ]


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested settings by dotted names; a list is one value."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {
        dotted: inner
        for key, part in value.items()
        for dotted, inner in _flat(f"{name}.{key}", part).items()
    }

"""Class pictures: others of a character's class, kept as a set for prior preservation.

A folder or archive of pictures with captions beside them in, a set in the store out that never
changes, under a name that stands for its pictures and captions. No model looks at them: a person
or the base itself made them, and their captions are used as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from captioning.decode import PictureError
from captioning.errors import UserError
from captioning.intake import checked_image, may_be_picture, read_source
from captioning.rows import read_rows, write_rows
from captioning.sidecars import PRECEDENCE, is_sidecar, read_sidecars
from captioning.sources import PICTURE_SUFFIXES, SourceFile, open_sources
from captioning.store import Store, content_hash
from captioning.versions import Sample

# As many hex digits as a trial's id has.
_NAME = re.compile(r"c[0-9a-f]{12}")
SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class ClassPictures:
    """A set of class pictures; the caption of those without one is empty."""

    name: str
    samples: tuple[Sample, ...]  # by sha256, so that files' names change no order


def is_class_set(name: str) -> bool:
    """Whether this is the name of a set, and no folder's."""
    return _NAME.fullmatch(name) is not None


def keep_class_pictures(store: Store, given: Path) -> ClassPictures:
    """Put a folder's (with subfolders) or ZIP archive's pictures into the store as a set.

    Captions beside them are read as intake reads them (see `sidecars`). Doing it again gives the
    same set, and only what was not kept before is decoded. Raises UserError, with no set written,
    when there is no picture, or a picture or a caption cannot be read.
    """
    hashes: dict[tuple[str, str], str] = {}
    labels: dict[str, str] = {}
    problems: list[tuple[str, str]] = []
    with open_sources([given]) as files:
        taken: list[SourceFile] = []
        for file in filter(may_be_picture, files):
            try:
                data = read_source(file)
                sha256 = hashlib.sha256(data).hexdigest()
                if not store.blobs.path(sha256).exists():
                    checked_image(data, sha256, file.label)
            except PictureError as refusal:
                problems.append((file.label, str(refusal)))
                continue
            store.blobs.put(data)
            taken.append(file)
            hashes[file.root, file.path] = sha256
            labels.setdefault(sha256, file.label)
        found, unread = read_sidecars([file for file in files if is_sidecar(file)], taken)
    problems += unread
    if problems:
        shown = "; ".join(f"{label}: {reason}" for label, reason in problems[:SHOWN_PROBLEMS])
        more = f" and {len(problems) - SHOWN_PROBLEMS} more" if problems[SHOWN_PROBLEMS:] else ""
        raise UserError(str(given), shown + more, "mend these files, or take them out")
    if not labels:
        raise UserError(
            str(given),
            "no pictures in it",
            f"give a folder or ZIP file with {', '.join(sorted(PICTURE_SUFFIXES))} files",
        )
    # The last one put into the dict counts: the form that is closest to the picture.
    found.sort(key=lambda one: -PRECEDENCE.index(one.form))
    captions = {hashes[one.picture.root, one.picture.path]: one.text for one in found}
    captions = {sha256: captions.get(sha256, "") for sha256 in sorted(labels)}
    name = _name_of(captions)
    if not _file(store, name).exists():
        rows = []
        for sha256, caption in captions.items():
            image = checked_image(store.blobs.get(sha256), sha256, labels[sha256])
            size = {"width": image.width, "height": image.height}
            rows.append({"sha256": sha256, "caption": caption, "source": image.source} | size)
        write_rows(_file(store, name), rows)
    return load_class_pictures(store, name)


def load_class_pictures(store: Store, name: str) -> ClassPictures:
    """The set of this name, every picture verified by its hash.

    Raises UserError when there is none, or it or a picture of it was changed.
    """
    file = _file(store, name)
    fix = "name the folder or ZIP file of the pictures in the recipe again"
    if not is_class_set(name) or not file.exists():
        raise UserError(f"class pictures {name}", f"there is no such set in {file.parent}", fix)
    try:
        rows = read_rows(file)
        whole = name == _name_of({row["sha256"]: row["caption"] for row in rows})
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(str(file), "it was changed since it was written", f"delete it; {fix}")
    samples = []
    for row in rows:
        path = store.blobs.path(row["sha256"])
        if not path.is_file() or content_hash(path) != row["sha256"]:
            raise UserError(str(path), f"the bytes of {row['source']} are missing or spoiled", fix)
        samples.append(
            Sample(
                sha256=row["sha256"],
                path=path,
                caption=row["caption"],
                width=row["width"],
                height=row["height"],
                source=row["source"],
            )
        )
    return ClassPictures(name, tuple(samples))


def _file(store: Store, name: str) -> Path:
    return store.class_pictures / f"{name}.jsonl"


def _name_of(captions: Mapping[str, str]) -> str:
    """`c` and 12 hex digits that stand for the pictures, by sha256, and their captions."""
    content = json.dumps(sorted(captions.items()))
    return "c" + hashlib.sha256(content.encode()).hexdigest()[:12]

"""Pictures taken in: decoded, hashed, stored as original bytes; what is no picture is named.

A folder in, images in the store out. The folder is only read; a picture's bytes are never edited.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from captioning.character import (
    Character,
    add_character,
    folder,
    list_characters,
    load_character,
)
from captioning.decode import PictureError, decode
from captioning.errors import UserError
from captioning.rows import read_rows, write_rows
from captioning.store import Store

IMAGES_FILE, SKIPPED_FILE = "images.jsonl", "skipped.jsonl"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
# Pictures too, but of formats that are not read; they are named instead of passed over.
UNREAD_SUFFIXES = {".heic", ".heif", ".jxl", ".jp2", ".psd", ".kra", ".xcf", ".svg", ".tga"}
# Below this a picture shows nothing to learn; the smallest base works at 64 px.
MIN_SIDE_PX = 32
# Beyond this a file is no picture of a character, and reading it whole would fill the memory.
MAX_FILE_BYTES = 256 * 1024 * 1024
SHOWN_REASONS = 5  # in the error for a folder without any picture

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class Image:
    """Original bytes in the store; width and height are those of the upright picture, in px."""

    sha256: str
    width: int
    height: int
    format: str
    source: str


@dataclass(frozen=True)
class Skipped:
    """A file that was not taken in, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class IntakeReport:
    """What one intake found."""

    images: tuple[Image, ...]
    skipped: tuple[Skipped, ...]
    duplicates: int


def take_in(
    pictures: Path, store: Store, character: Character, progress: ProgressCallback | None = None
) -> IntakeReport:
    """Take in every picture of a folder and its subfolders for `character`.

    Adding again merges. Raises UserError, with nothing written, when there is no folder, when it
    holds no picture, or when the character is known under another trigger.
    """
    files = _files(pictures)
    character = _with_known_rules(store, character)
    images: dict[str, Image] = {}
    skipped: list[Skipped] = []
    duplicates = 0
    for done, file in enumerate(files, start=1):
        source = _source(file, pictures)
        try:
            data = _read_inside(file, pictures)
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 in images:
                duplicates += 1
            else:
                images[sha256] = _image(data, sha256, source)
                store.blobs.put(data)
        except PictureError as refusal:
            skipped.append(Skipped(source, str(refusal)))
        if progress:
            progress(done, len(files))
    if not images:
        reasons = "; ".join(f"{item.source}: {item.reason}" for item in skipped[:SHOWN_REASONS])
        raise UserError(
            str(pictures),
            f"no picture could be decoded ({reasons})" if reasons else "no pictures in it",
            f"give a folder with {', '.join(sorted(SUFFIXES))} files",
        )
    report = IntakeReport(tuple(images.values()), tuple(skipped), duplicates)
    _record(store, character, report)
    return report


def load_images(store: Store, name: str) -> list[Image]:
    """The character's images in the order of their first intake; UserError when it is unknown."""
    load_character(store, name)
    return [Image(**row) for row in read_rows(folder(store, name) / IMAGES_FILE)]


def load_skipped(store: Store, name: str) -> list[Skipped]:
    """The files that were not taken in."""
    return [Skipped(**row) for row in read_rows(folder(store, name) / SKIPPED_FILE)]


def read_image(store: Store, image: Image) -> bytes:
    """The image's original bytes; raises UserError when the store lost or spoiled them."""
    try:
        return store.blobs.get(image.sha256)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            str(store.blobs.path(image.sha256)),
            f"the bytes of {image.source} are missing or spoiled",
            "add the folder with that picture again",
        ) from error


def _files(pictures: Path) -> list[Path]:
    if not pictures.is_dir():
        raise UserError(
            str(pictures), "there is no such folder", "give the folder that holds the pictures"
        )
    found = [
        path
        for path in pictures.rglob("*")
        if path.suffix.lower() in SUFFIXES | UNREAD_SUFFIXES
        and (path.is_file() or path.is_symlink())
        and not path.name.startswith(".")
    ]
    return sorted(found, key=lambda path: _natural(path.relative_to(pictures).as_posix()))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which `2.png` comes before `10.png`."""
    return [
        (int(part), "") if part.isdigit() else (-1, part.casefold())
        for part in re.split(r"([0-9]+)", name)
    ]


def _source(file: Path, pictures: Path) -> str:
    """The name inside the folder; bytes that are no UTF-8 become the replacement character."""
    return os.fsencode(file.relative_to(pictures).as_posix()).decode("utf-8", "replace")


def _read_inside(file: Path, pictures: Path) -> bytes:
    if file.suffix.lower() in UNREAD_SUFFIXES:
        raise PictureError(f"{file.suffix.lower()} is not read; save it as PNG or JPEG")
    try:
        target = file.resolve(strict=True)
        if not target.is_relative_to(pictures.resolve()):
            raise PictureError("a link that leads out of the folder")
        if target.stat().st_size > MAX_FILE_BYTES:
            raise PictureError(f"larger than {MAX_FILE_BYTES // 1024**2} MB")
        return target.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        reason = error.strerror if isinstance(error, OSError) else "a link that leads to itself"
        raise PictureError(f"not readable: {reason}") from error


def _image(data: bytes, sha256: str, source: str) -> Image:
    picture, kind = decode(data)
    if min(picture.size) < MIN_SIDE_PX:
        raise PictureError(f"{picture.width}×{picture.height} px is smaller than {MIN_SIDE_PX} px")
    return Image(sha256, picture.width, picture.height, kind, source)


def _with_known_rules(store: Store, character: Character) -> Character:
    """The character as given, with the rules it already has; its trigger may not change."""
    if character.name not in list_characters(store):
        return character
    known = load_character(store, character.name)
    if known.trigger != character.trigger:
        raise UserError(
            f"character {character.name}",
            f"it has the trigger {known.trigger!r} already, not {character.trigger!r}",
            f"use --trigger {known.trigger}, or another name",
        )
    return character.model_copy(update={"rules": known.rules})


def _record(store: Store, character: Character, report: IntakeReport) -> None:
    place = folder(store, character.name)
    images = {row["sha256"]: row for row in read_rows(place / IMAGES_FILE)}
    images |= {image.sha256: asdict(image) for image in report.images if image.sha256 not in images}
    skipped = {row["source"]: row for row in read_rows(place / SKIPPED_FILE)}
    skipped |= {item.source: asdict(item) for item in report.skipped}
    for image in report.images:
        skipped.pop(image.source, None)
    write_rows(place / IMAGES_FILE, images.values())
    write_rows(place / SKIPPED_FILE, skipped.values())
    add_character(store, character)  # last: a character that is listed has its pictures

"""Pictures taken in: decoded, hashed, stored as original bytes; what is no picture is named.

Folders, archives and files in, images in the store out, with the captions that came beside them.
What was given is only read; a picture's bytes are never edited.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from captioning.character import (
    Character,
    add_character,
    folder,
    list_characters,
    load_character,
)
from captioning.decode import PictureError, inspect
from captioning.errors import UserError
from captioning.rows import read_rows, to_lines, write_rows
from captioning.sidecars import PRECEDENCE, Form, Found, is_sidecar, read_sidecars
from captioning.sources import (
    ARCHIVE_SUFFIXES,
    NESTED_SUFFIXES,
    PICTURE_SUFFIXES,
    UNREAD_SUFFIXES,
    SourceFile,
    open_sources,
)
from captioning.store import Store
from captioning.unpack import UnpackLimits

IMAGES_FILE, SKIPPED_FILE, IMPORTED_FILE = "images.jsonl", "skipped.jsonl", "imported.jsonl"
JOURNAL_FILE = "intake-journal.jsonl"
# Below this a picture shows nothing to learn; the smallest base works at 64 px.
MIN_SIDE_PX = 32
SHOWN_REASONS = 5  # in the error for a folder without any picture

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class Image:
    """Original bytes in the store; width and height are those of the upright picture, in px.

    `frames` is 1, or the number of frames of an animation or pages, of which the first is used.
    """

    sha256: str
    width: int
    height: int
    format: str
    source: str
    frames: int = 1


@dataclass(frozen=True)
class Skipped:
    """A file that was not taken in, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class ImportedCaption:
    """A caption that came with a picture; `origin` is the file that it was read from."""

    sha256: str
    source: str
    text: str
    tags: tuple[str, ...]
    form: Form
    origin: str


@dataclass(frozen=True)
class IntakeReport:
    """What one intake found; `notes` are on files that were used only in part, or not as meant."""

    images: tuple[Image, ...]
    skipped: tuple[Skipped, ...]
    duplicates: int
    imported: tuple[ImportedCaption, ...] = ()
    notes: tuple[Skipped, ...] = ()


def take_in(
    pictures: Path | Sequence[Path],
    store: Store,
    character: Character,
    progress: ProgressCallback | None = None,
    captions: Literal["keep", "ignore"] = "keep",
    limits: UnpackLimits | None = None,
) -> IntakeReport:
    """Take in every picture of folders (with subfolders), ZIP archives and files for `character`.

    Captions found beside them (see `sidecars`) are kept as imported, or left alone. One picture is
    in memory at a time. Adding again merges, and what an earlier or killed intake decoded is
    recognised by its sha256. Raises UserError, with nothing written, when a path is missing, an
    archive is refused, there is no picture, or the character is known under another trigger.
    """
    given = [pictures] if isinstance(pictures, Path) else list(pictures)
    character = _with_known_rules(store, character)
    with open_sources(given, limits) as files, _Journal(store, character.name) as journal:
        images: dict[str, Image] = {}
        taken: list[tuple[SourceFile, str]] = []
        skipped: list[Skipped] = []
        candidates = [file for file in files if may_be_picture(file)]
        for done, file in enumerate(candidates, start=1):
            try:
                data = read_source(file)
                sha256 = hashlib.sha256(data).hexdigest()
                if sha256 not in images:
                    images[sha256] = journal.known(sha256, file.label) or checked_image(
                        data, sha256, file.label
                    )
                    store.blobs.put(data)
                    journal.keep(images[sha256])
                taken.append((file, sha256))
            except PictureError as refusal:
                skipped.append(Skipped(file.label, str(refusal)))
            if progress:
                progress(done, len(candidates))
        if not images:
            raise _nothing(given, skipped)
        found: list[Found] = []
        notes = [
            Skipped(image.source, f"has {image.frames} frames or pages; the first is used")
            for image in images.values()
            if image.frames > 1
        ]
        if captions == "keep":
            sidecars = [file for file in files if is_sidecar(file)]
            found, problems = read_sidecars(sidecars, [file for file, _ in taken])
            notes += [Skipped(*problem) for problem in problems]
        hashes = {(file.root, file.path): sha256 for file, sha256 in taken}
        report = IntakeReport(
            tuple(images.values()),
            tuple(skipped),
            len(taken) - len(images),
            tuple(_imported(one, hashes) for one in found),
            tuple(notes),
        )
        _record(store, character, report, {file.label for file, _ in taken})
        journal.forget()
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


def load_imported(store: Store, name: str) -> dict[str, ImportedCaption]:
    """The caption that came with each image, by sha256, for those that have one.

    If there are several, the closest to the picture counts (see `sidecars.PRECEDENCE`), then the
    newest; all are kept in the character's imported.jsonl. Raises UserError when the character is
    unknown.
    """
    load_character(store, name)
    rows = read_rows(folder(store, name) / IMPORTED_FILE)
    every = [ImportedCaption(**row | {"tags": tuple(row["tags"])}) for row in rows]
    # The last one put into the dict counts.
    every.sort(key=lambda caption: -PRECEDENCE.index(caption.form))
    return {caption.sha256: caption for caption in every}


class _Journal:
    """The pictures that a running intake has decoded, so that a killed one can go on.

    One row is appended per picture; a row that was torn in the middle is passed over. The folder
    appears with the first row.
    """

    def __init__(self, store: Store, name: str) -> None:
        place = folder(store, name)
        self._path = place / JOURNAL_FILE
        rows = read_rows(place / IMAGES_FILE) + list(_whole_rows(self._path))
        self._rows = {row["sha256"]: row for row in rows}
        self._file: IO[str] | None = None

    def __enter__(self) -> _Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file:
            self._file.close()

    def known(self, sha256: str, source: str) -> Image | None:
        """The image when its bytes were decoded before, under the name that it has now."""
        row = self._rows.get(sha256)
        return Image(**row | {"source": source}) if row else None

    def keep(self, image: Image) -> None:
        if image.sha256 in self._rows:
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            self._file.write("\n")  # ends a row that was torn
        self._file.write(to_lines([asdict(image)]))
        self._file.flush()
        self._rows[image.sha256] = asdict(image)

    def forget(self) -> None:
        """Remove the journal, since all of it is recorded."""
        self._path.unlink(missing_ok=True)


def _whole_rows(journal: Path) -> list[dict[str, Any]]:
    if not journal.exists():
        return []
    rows = []
    for line in journal.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
            Image(**row)
        except (ValueError, TypeError):
            continue
        rows.append(row)
    return rows


def may_be_picture(file: SourceFile) -> bool:
    """Whether a file may hold pictures, by its name alone; all others are passed over."""
    return file.suffix in PICTURE_SUFFIXES | UNREAD_SUFFIXES | NESTED_SUFFIXES


def read_source(file: SourceFile) -> bytes:
    """The bytes of a file that may be a picture; PictureError when its kind is not read."""
    if file.suffix in ARCHIVE_SUFFIXES:
        raise PictureError("an archive inside a folder or archive is not read; give it by itself")
    if file.suffix in NESTED_SUFFIXES:
        raise PictureError(f"{file.suffix} is not read; pack it as a ZIP file")
    if file.suffix in UNREAD_SUFFIXES:
        raise PictureError(f"{file.suffix} is not read; save it as PNG or JPEG")
    return file.read()


def _nothing(given: list[Path], skipped: list[Skipped]) -> UserError:
    reasons = "; ".join(f"{item.source}: {item.reason}" for item in skipped[:SHOWN_REASONS])
    return UserError(
        ", ".join(map(str, given)),
        f"no picture could be decoded ({reasons})" if reasons else "no pictures in it",
        f"give a folder or ZIP file with {', '.join(sorted(PICTURE_SUFFIXES))} files",
    )


def checked_image(data: bytes, sha256: str, source: str) -> Image:
    """The facts of a picture, decoded whole; PictureError when damaged or too small for a base."""
    facts = inspect(data)
    if min(facts.width, facts.height) < MIN_SIDE_PX:
        raise PictureError(f"{facts.width}×{facts.height} px is smaller than {MIN_SIDE_PX} px")
    return Image(sha256, facts.width, facts.height, facts.format, source, facts.frames)


def _imported(found: Found, hashes: dict[tuple[str, str], str]) -> ImportedCaption:
    sha256 = hashes[found.picture.root, found.picture.path]
    return ImportedCaption(
        sha256, found.picture.label, found.text, found.tags, found.form, found.origin
    )


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


def _record(
    store: Store, character: Character, report: IntakeReport, good_sources: set[str]
) -> None:
    place = folder(store, character.name)
    images = {row["sha256"]: row for row in read_rows(place / IMAGES_FILE)}
    images |= {image.sha256: asdict(image) for image in report.images if image.sha256 not in images}
    rows = [*read_rows(place / SKIPPED_FILE), *map(asdict, report.skipped)]
    skipped = {row["source"]: row for row in rows if row["source"] not in good_sources}
    captions = {
        (row["sha256"], row["origin"]): row
        for row in [*read_rows(place / IMPORTED_FILE), *map(asdict, report.imported)]
    }
    write_rows(place / IMAGES_FILE, images.values())
    write_rows(place / SKIPPED_FILE, skipped.values())
    if captions:
        write_rows(place / IMPORTED_FILE, captions.values())
    add_character(store, character)  # last: a character that is listed has its pictures

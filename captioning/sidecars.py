"""Captions that came with the pictures, read from the forms that trainers and taggers write.

Text beside a picture (`1.txt`, `1.caption`), tables (`metadata.csv` with or without a header,
`metadata.jsonl`), kohya's JSON. Bytes in, captions out; what cannot be read is said, never guessed.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from captioning.decode import PictureError
from captioning.sources import SourceFile

Form = Literal["text", "csv", "jsonl", "kohya"]
# The form that counts when several speak of one picture: the closest to the picture first.
PRECEDENCE: tuple[Form, ...] = ("text", "csv", "jsonl", "kohya")
# sd-scripts' default extension is .caption; every guide uses .txt.
TEXT_SUFFIXES = (".txt", ".caption")
TABLE_SUFFIXES = (".csv", ".jsonl", ".json")
# Tables are read when their names begin so: metadata.csv, meta_cap.json, captions.jsonl, ...
TABLE_NAMES = ("meta", "caption")
# Far more than a caption; a text of this size beside a picture is something else.
MAX_TEXT_BYTES = 64 * 1024
# kohya's JSON of 100,000 pictures has some 30 MB.
MAX_TABLE_BYTES = 64 * 1024 * 1024
# The names that tools give to the two columns (or keys) of a table.
FILE_KEYS = ("file_name", "filename", "file", "image", "image_path", "path", "name")
TEXT_KEYS = ("text", "caption", "prompt", "description", "tags")
SHOWN_PROBLEMS = 3  # of one table, in its note


class SidecarError(ValueError):
    """The bytes hold no captions that can be read; the message says why."""


@dataclass(frozen=True)
class Line:
    """One picture's caption in a table, the picture named as the table names it."""

    picture: str
    text: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """What a table held, and the lines of it that could not be read."""

    lines: tuple[Line, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """A caption that belongs to a picture file; `origin` is the sidecar's label."""

    picture: SourceFile
    text: str
    tags: tuple[str, ...]
    form: Form
    origin: str


def is_sidecar(file: SourceFile) -> bool:
    """Whether captions may be in the file, by its name alone."""
    return file.suffix in TEXT_SUFFIXES or _is_table(file)


def read_sidecars(
    sidecars: Iterable[SourceFile], pictures: Sequence[SourceFile]
) -> tuple[list[Found], list[tuple[str, str]]]:
    """The captions for `pictures`, and notes (label, reason) on what could not be read or placed.

    A sidecar speaks of pictures of its own root only. A text without a picture of its name is no
    caption and is passed over.
    """
    places = {root: _Places(pictures, root) for root in {file.root for file in pictures}}
    found: list[Found] = []
    notes: list[tuple[str, str]] = []
    for file in sidecars:
        near = places.get(file.root)
        if near is None:
            continue
        try:
            if file.suffix in TEXT_SUFFIXES:
                found += _of_text(file, near)
            else:
                captions, problems = _of_table(file, near)
                found += captions
                notes += [(file.label, problem) for problem in problems]
        except (SidecarError, PictureError) as error:
            notes.append((file.label, str(error)))
    return found, notes


def parse_text(data: bytes) -> str:
    """The caption in a text file, without the white space around it; raises SidecarError."""
    if len(data) > MAX_TEXT_BYTES:
        raise SidecarError(f"{len(data) // 1024} KB is no caption")
    text = _decoded(data).strip()
    if not text:
        raise SidecarError("an empty caption")
    return text


def parse_csv(data: bytes) -> Table:
    """A table of file and caption, headed (`file_name,text`) or not; raises SidecarError.

    Without a header the first column is the file and all others are the caption, so that one
    written without quotes (`1.png,red hair,smile`) is whole again.
    """
    reader = csv.reader(io.StringIO(_decoded(data), newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise SidecarError(f"no readable CSV: {error} at line {reader.line_num}") from error
    if not rows:
        raise SidecarError("an empty table")
    header = [cell.strip().casefold() for cell in rows[0][1]]
    file_column, text_column = _column(header, FILE_KEYS), _column(header, TEXT_KEYS)
    headed = file_column is not None and text_column is not None
    lines, problems = [], []
    for number, row in rows[1:] if headed else rows:
        if file_column is not None and text_column is not None:
            cells = [*row, *[""] * len(header)]
            name, text = cells[file_column].strip(), cells[text_column].strip()
        else:
            name, text = row[0].strip(), ",".join(row[1:]).strip()
        if name and text:
            lines.append(Line(name, text))
        else:
            problems.append(f"line {number} lacks a file name or a caption")
    return Table(tuple(lines), tuple(problems))


def parse_jsonl(data: bytes) -> Table:
    """Hugging Face's metadata.jsonl, `file_name` and `text` on each line; raises SidecarError."""
    lines, problems = [], []
    for number, raw in enumerate(_decoded(data).split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = _json(raw)
        except SidecarError:
            row = None
        name, text = _entry(row, FILE_KEYS), _entry(row, TEXT_KEYS)
        if name and text:
            lines.append(Line(name, text))
        else:
            problems.append(f"line {number} is no object with file_name and text")
    if not lines and not problems:
        raise SidecarError("an empty table")
    return Table(tuple(lines), tuple(problems))


def parse_kohya(data: bytes) -> Table:
    """sd-scripts' `{path: {caption, tags}}`; raises SidecarError when it is another JSON."""
    entries = _json(_decoded(data))
    if not isinstance(entries, dict) or not entries:
        raise SidecarError("not kohya's JSON: no object of pictures")
    lines, problems = [], []
    for name, entry in entries.items():
        caption, tags = _entry(entry, ("caption",)), _entry(entry, ("tags",))
        if caption or tags:
            parts = tuple(tag.strip() for tag in tags.split(",") if tag.strip())
            lines.append(Line(_whole(name), caption or tags, parts))
        else:
            problems.append(f"{name!r} has neither caption nor tags")
    return Table(tuple(lines), tuple(problems))


_PARSERS = {".csv": parse_csv, ".jsonl": parse_jsonl, ".json": parse_kohya}
_FORMS: dict[str, Form] = {".csv": "csv", ".jsonl": "jsonl", ".json": "kohya"}


class _Places:
    """The picture files of one root, found by the names that sidecars use."""

    def __init__(self, pictures: Sequence[SourceFile], root: str) -> None:
        self.by_path: dict[str, list[SourceFile]] = {}
        self.by_stem: dict[str, list[SourceFile]] = {}  # the path without its suffix
        self.by_name: dict[str, list[SourceFile]] = {}
        for file in pictures:
            if file.root == root:
                path = PurePosixPath(file.path)
                self.by_path.setdefault(file.path, []).append(file)
                self.by_stem.setdefault(str(path.with_suffix("")), []).append(file)
                for name in {path.name, path.stem}:
                    self.by_name.setdefault(name, []).append(file)

    def beside(self, sidecar: str) -> list[SourceFile]:
        """The pictures that a text belongs to: `1.png` of `1.txt` or of `1.png.txt`."""
        stem = str(PurePosixPath(sidecar).with_suffix(""))
        return self.by_path.get(stem) or self.by_stem.get(stem, [])

    def named(self, name: str, table: str) -> list[SourceFile]:
        """The pictures that a table means: by path, else by a bare name that only one has.

        kohya's JSON may have the paths of another machine, and leave the suffix out.
        """
        path = PurePosixPath(name.replace("\\", "/"))
        for full in (str(PurePosixPath(table).parent / path), str(path)):
            if found := self.by_path.get(full) or self.by_stem.get(full):
                return found
        alone = self.by_name.get(path.name) or self.by_name.get(path.stem, [])
        return alone if len(alone) == 1 else []


def _is_table(file: SourceFile) -> bool:
    name = PurePosixPath(file.path).name.casefold()
    return file.suffix in TABLE_SUFFIXES and name.startswith(TABLE_NAMES)


def _of_text(file: SourceFile, near: _Places) -> list[Found]:
    pictures = near.beside(file.path)
    if not pictures:
        return []
    text = parse_text(file.read())
    return [Found(picture, text, (), "text", file.label) for picture in pictures]


def _of_table(file: SourceFile, near: _Places) -> tuple[list[Found], list[str]]:
    data = file.read()
    if len(data) > MAX_TABLE_BYTES:
        raise SidecarError(f"larger than {MAX_TABLE_BYTES // 1024**2} MB")
    table = _PARSERS[file.suffix](data)
    found: list[Found] = []
    homeless: list[str] = []
    for line in table.lines:
        pictures = near.named(line.picture, file.path)
        form = _FORMS[file.suffix]
        found += [Found(one, line.text, line.tags, form, file.label) for one in pictures]
        if not pictures:
            homeless.append(line.picture)
    notes = []
    if table.problems:
        notes.append(_some(f"{len(table.problems)} captions not read", table.problems))
    if homeless:
        known = f"{len(homeless)} of {len(table.lines)} captions are of no picture given here"
        notes.append(_some(known, homeless))
    return found, notes


def _some(what: str, examples: Sequence[str]) -> str:
    more = ", …" if len(examples) > SHOWN_PROBLEMS else ""
    return f"{what}: {', '.join(examples[:SHOWN_PROBLEMS])}{more}"


def _decoded(data: bytes) -> str:
    try:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SidecarError("not UTF-8; save it with that encoding") from error


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SidecarError(f"not valid JSON: {error}") from error


def _entry(row: object, keys: tuple[str, ...]) -> str:
    """The first of `keys` that holds text; empty when none does."""
    if not isinstance(row, dict):
        return ""
    for key in keys:
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            return _whole(value.strip())
    return ""


def _whole(text: str) -> str:
    """Replace half characters, which JSON can spell and UTF-8 cannot, by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _column(header: list[str], keys: tuple[str, ...]) -> int | None:
    return next((header.index(key) for key in keys if key in header), None)

"""Lists all readable files of the folders, files and ZIP archives that a person gave.

Paths in, files out, each with a name that people know it by. Everything is only read: nothing is
unpacked to disk, and no link is followed out of a folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from captioning.decode import PictureError
from captioning.errors import UserError
from captioning.unpack import UnpackLimits, open_archive

PICTURE_SUFFIXES = {
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
}
# Pictures or collections of them too, but not read; they are named instead of passed over.
UNREAD_SUFFIXES = {
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".psd",
    ".kra",
    ".xcf",
    ".svg",
    ".tga",
}
ARCHIVE_SUFFIXES = {".zip", ".cbz"}
# Collections of files, named as well; a ZIP file is read when it is given itself.
NESTED_SUFFIXES = {*ARCHIVE_SUFFIXES, ".rar", ".7z", ".tar", ".gz"}
# Beyond this a file is no picture of a character, and reading it whole would fill the memory.
MAX_FILE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class SourceFile:
    """A file to read: its place inside what was given, and its name for people."""

    root: str  # what was given: files of one root may belong together
    path: str  # inside the root, with forward slashes
    label: str  # for people
    read: Callable[[], bytes]  # raises PictureError with the reason

    @property
    def suffix(self) -> str:
        return Path(self.path).suffix.lower()


@contextmanager
def open_sources(
    given: Sequence[Path], limits: UnpackLimits | None = None
) -> Iterator[list[SourceFile]]:
    """All files of the folders, archives and files `given`, in natural order inside each.

    With one path given, labels are the names inside it; with several they begin with the path's
    own name. Hidden files are left out. Raises UserError for a path that does not exist or an
    archive that is refused whole (see `unpack`).
    """
    paths = list({path.resolve(): path for path in given}.values())
    if not paths:
        raise UserError("pictures", "nothing was given", _GIVE)
    for path in paths:
        if not path.exists():
            raise UserError(str(path), "there is no such folder or file", _GIVE)
    prefixes = _prefixes(paths)
    with ExitStack() as opened:
        files: list[SourceFile] = []
        for path in paths:
            prefix = prefixes[path]
            if path.is_dir():
                files += _in_folder(path, prefix)
            elif path.suffix.lower() in ARCHIVE_SUFFIXES:
                archive = opened.enter_context(open_archive(path, limits))
                names = {member.name: member for member in archive.members}
                files += [
                    SourceFile(
                        str(path),
                        name,
                        prefix + _printable(name),
                        partial(archive.read, names[name]),
                    )
                    for name in sorted(names, key=natural)
                    if not _hidden(name)
                ]
            else:
                label = _printable(prefix.rstrip("/") or path.name)
                read = partial(_read_file, path)
                files.append(SourceFile(str(path.absolute().parent), path.name, label, read))
        yield files


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key by which `2.png` comes before `10.png`."""
    parts = re.split(r"([0-9]+)", name)
    key = [(-1, part.casefold()) for part in parts]
    for place in range(1, len(parts), 2):  # numbers: the longer one is the larger one
        digits = parts[place].lstrip("0")
        key[place] = (len(digits), digits)
    return key, name


# Control characters could write over the terminal that they are shown in.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_GIVE = "give the folder that holds the pictures, a ZIP file, or the pictures themselves"


def _prefixes(paths: list[Path]) -> dict[Path, str]:
    """The beginning of each path's labels: as many of its last parts as tell the paths apart."""
    if len(paths) == 1:
        return {paths[0]: ""}
    parts = {path: path.resolve().parts for path in paths}
    depth = 1
    while len({names[-depth:] for names in parts.values()}) < len(paths):
        depth += 1
    return {path: _printable("/".join(parts[path][-depth:])) + "/" for path in paths}


def _in_folder(folder: Path, prefix: str) -> Iterator[SourceFile]:
    found = [
        path
        for path in folder.rglob("*")
        if (path.is_file() or path.is_symlink()) and not path.is_dir()
    ]
    names = {path: path.relative_to(folder).as_posix() for path in found}
    for path in sorted(found, key=lambda path: natural(names[path])):
        if not _hidden(names[path]):
            label = prefix + _printable(names[path])
            yield SourceFile(str(folder), names[path], label, partial(_read_inside, path, folder))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _printable(name: str) -> str:
    """Bytes that are no UTF-8, and control characters, become the replacement character."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return _CONTROL.sub("\ufffd", text)


def _read_inside(file: Path, folder: Path) -> bytes:
    try:
        inside = file.resolve(strict=True).is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        raise _unreadable(error) from error
    if not inside:
        raise PictureError("a link that leads out of the folder")
    return _read_file(file)


def _read_file(file: Path) -> bytes:
    try:
        if not file.is_file():  # a pipe or a device would never end
            raise PictureError("not readable: no plain file")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise PictureError(f"larger than {MAX_FILE_BYTES // 1024**2} MB")
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> PictureError:
    reason = error.strerror if isinstance(error, OSError) else "a link that leads to itself"
    return PictureError(f"not readable: {reason}")

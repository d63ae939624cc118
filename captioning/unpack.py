"""ZIP archives from anywhere, read without trusting them; nothing is ever unpacked to disk.

An archive whose list of members is hostile (names that lead out, links, duplicates) or beyond the
limits is refused whole, before one member is read. Members are then read one by one into memory.
"""

from __future__ import annotations

import io
import stat
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from captioning.decode import PictureError
from captioning.errors import UserError

MIB = 1024 * 1024
READ_BYTES = MIB  # the bytes of a member that are read at a time
# Files that systems add by themselves; nobody put them in on purpose.
SYSTEM_FOLDER = "__MACOSX"
SHOWN_NAME = 120  # characters of a member's name in a message


@dataclass(frozen=True)
class UnpackLimits:
    """What an archive may hold. The defaults fit a character's pictures with room to spare."""

    # Four times the largest folder (5,000 pictures) that the farm is built for, with a caption
    # file beside each picture.
    members: int = 40_000
    # One picture; the same bound as for a file in a folder (`sources.MAX_FILE_BYTES`).
    member_bytes: int = 256 * MIB
    # All members together once unpacked: 5,000 pictures of 6 MB.
    total_bytes: int = 30 * 1024 * MIB
    # Unpacked / packed bytes of one member. Pictures are compressed already (ratio 1); flat
    # drawings as BMP reach some 100; deflate itself ends at 1032.
    ratio: float = 200.0
    # Below this a member cannot hurt, whatever its ratio: a caption of one repeated letter.
    ratio_from_bytes: int = MIB
    # The list of members, which zipfile reads into memory whole: 40,000 names of 350 bytes.
    directory_bytes: int = 16 * MIB


@dataclass(frozen=True)
class Member:
    """A file inside an archive; `name` is a plain relative path with forward slashes."""

    name: str
    size_bytes: int
    info: zipfile.ZipInfo


class Archive:
    """An opened archive whose list of members was found harmless."""

    def __init__(self, opened: zipfile.ZipFile, members: tuple[Member, ...]) -> None:
        self._opened = opened
        self.members = members

    def read(self, member: Member) -> bytes:
        """The member's bytes; raises PictureError when they are damaged or not as declared."""
        try:
            with self._opened.open(member.info) as stream:
                # zipfile never gives more than the declared size, which the limits were held to.
                data = b"".join(iter(lambda: stream.read(READ_BYTES), b""))
        except NotImplementedError as error:  # deflate64 and other rare methods
            raise PictureError(f"packed in a way that is not read: {error}") from error
        except Exception as error:  # BadZipFile, zlib.error, EOFError, struct.error, OSError, ...
            reason = str(error) or type(error).__name__
            raise PictureError(f"damaged inside the archive: {reason}") from error
        if len(data) != member.size_bytes:
            raise PictureError("damaged inside the archive: not as long as declared")
        return data


@contextmanager
def open_archive(path: Path, limits: UnpackLimits | None = None) -> Iterator[Archive]:
    """Open a ZIP file and check its list of members.

    Raises UserError when it is no ZIP file, is encrypted, is beyond a limit, or names a member
    that is absolute, leads out with `..`, is a link, or is there twice (also when only upper and
    lower case differ, which are one file on Windows and macOS).
    """
    limits = limits or UnpackLimits()
    with ExitStack() as opened:
        try:
            file = opened.enter_context(_Bounded(path, limits.directory_bytes))
            archive = opened.enter_context(zipfile.ZipFile(file))
        except _ListTooLong as error:
            found = f"a list of members of more than {limits.directory_bytes // MIB} MB"
            raise _beyond(path, found) from error
        except Exception as error:  # BadZipFile, OSError, and what odd bytes lead zipfile to
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UserError(str(path), f"not a readable ZIP file: {reason}", _REPACK) from error
        yield Archive(archive, _members(path, archive.infolist(), limits))


_REPACK = "pack the pictures' folder again as a plain ZIP file"


def _members(path: Path, infos: list[zipfile.ZipInfo], limits: UnpackLimits) -> tuple[Member, ...]:
    if len(infos) > limits.members:
        raise _beyond(path, f"{len(infos)} members, more than {limits.members}")
    members: list[Member] = []
    seen: dict[str, str] = {}
    total = 0
    for info in infos:
        name = _plain_name(path, info)
        if name.endswith("/"):  # a folder
            continue
        folded = _folded(name)
        if folded in seen:
            raise _hostile(path, name, f"is there twice (as {seen[folded][:SHOWN_NAME]!r})")
        seen[folded] = name
        total += info.file_size
        if total > limits.total_bytes:
            raise _beyond(path, f"more than {limits.total_bytes // MIB} MB once unpacked")
        _check_size(path, info, limits)
        if not name.startswith(f"{SYSTEM_FOLDER}/"):
            members.append(Member(name, info.file_size, info))
    for name in seen.values():
        for parent in PurePosixPath(name).parents:
            if _folded(str(parent)) in seen:
                raise _hostile(path, name, f"lies in {parent}, which is a file")
    return tuple(members)


def _folded(name: str) -> str:
    """The name as file systems see it that know neither case nor the forms of accents."""
    return unicodedata.normalize("NFC", name).casefold()


def _plain_name(path: Path, info: zipfile.ZipInfo) -> str:
    """The member's name when it is harmless.

    `orig_filename` is what the archive says; zipfile already cut `filename` at a NUL byte.
    """
    given = info.orig_filename
    # Windows tools write backslashes, and Windows would read them as separators.
    name = given.replace("\\", "/")
    parts = name.rstrip("/").split("/")
    if "\0" in given:
        raise _hostile(path, given, "has a NUL byte in its name")
    if name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        raise _hostile(path, given, "is an absolute path")
    if ".." in parts:
        raise _hostile(path, given, "leads out of the archive")
    if "" in parts or "." in parts:
        raise _hostile(path, given, "is no plain path")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        raise _hostile(path, given, "is a link")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _hostile(path, given, "is no file")
    if info.flag_bits & 1:
        raise UserError(str(path), f"{given[:SHOWN_NAME]!r} is encrypted", "pack without password")
    return name


def _check_size(path: Path, info: zipfile.ZipInfo, limits: UnpackLimits) -> None:
    name = info.filename[:SHOWN_NAME]
    if info.file_size > limits.member_bytes:
        raise _beyond(path, f"{name!r} has more than {limits.member_bytes // MIB} MB")
    if info.file_size >= limits.ratio_from_bytes:
        ratio = info.file_size / max(1, info.compress_size)
        if ratio > limits.ratio:
            raise _beyond(path, f"{name!r} unpacks to {ratio:.0f} times its packed size")


def _hostile(path: Path, name: str, what: str) -> UserError:
    return UserError(str(path), f"the member {name[:SHOWN_NAME]!r} {what}", _REPACK)


def _beyond(path: Path, found: str) -> UserError:
    return UserError(str(path), found, "split it into smaller archives, or give the folder itself")


class _ListTooLong(Exception):
    pass


class _Bounded(io.FileIO):
    """The archive's bytes, never more than `most_bytes` at once.

    zipfile reads the list of members in one piece, however long the archive says that it is.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        super().__init__(path, "rb")
        self._most_bytes = most_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # only the search for the end of the list asks so
            size = self._most_bytes
        if size > self._most_bytes:
            raise _ListTooLong
        return super().read(size) or b""

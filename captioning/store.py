"""Bytes on disk: atomic writes and content-addressed blobs.

A file appears whole or not at all: it is written beside its target under a temporary name,
flushed to the disk and then renamed. Nothing here ever edits a file in place.
"""

import hashlib
import os
import tempfile
from pathlib import Path

# A temporary file is its owner's alone; what it becomes is for the studio's other users as well.
FILE_MODE = 0o644


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, never sees half of it.

    Raises OSError (for example ENOSPC, a full disk) after removing the temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), FILE_MODE)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Flush a directory entry, so that a rename inside it survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BlobStore:
    """Original bytes under `<root>/<aa>/<sha256>`; the same bytes are stored once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, sha256: str) -> Path:
        return self.root / sha256[:2] / sha256

    def put(self, data: bytes) -> str:
        """Store `data` and return its sha256 (64 hex digits); a rotten blob is made good."""
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.path(sha256)
        if not path.exists() or path.read_bytes() != data:
            write_atomic(path, data)
        return sha256

    def get(self, sha256: str) -> bytes:
        """Return the bytes; raises FileNotFoundError if absent, ValueError if they rotted."""
        data = self.path(sha256).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"{self.path(sha256)}: its content no longer matches its name")
        return data


class Store:
    """The farm's folder of bytes; each kind of thing has its own place in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = BlobStore(root / "blobs")
        self.observations = root / "observations"
        self.characters = root / "characters"
        self.datasets = root / "datasets"
        self.class_pictures = root / "class_pictures"
        self.latents = root / "latents"
        self.runs = root / "runs"
        self.sweeps = root / "sweeps"
        self.adapters = root / "adapters"


def content_hash(path: Path) -> str:
    """sha256 (64 hex digits) of a file's bytes, or of a folder's names and bytes, sorted.

    Hidden files do not count. Raises FileNotFoundError when there is nothing at `path`.
    """
    if path.is_file():
        return _file_sha256(path)
    if not path.is_dir():
        raise FileNotFoundError(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and not any(part.startswith(".") for part in name.split("/")):
            digest.update(f"{name}\0{_file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.store import BlobStore, write_atomic


@given(data=st.binary(max_size=4096))
def test_blobs_come_back_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    blobs = BlobStore(tmp_path_factory.mktemp("blobs"))
    assert blobs.get(blobs.put(data)) == data


def test_a_rotten_blob_is_refused(tmp_path: Path):
    blobs = BlobStore(tmp_path)
    sha256 = blobs.put(b"good")
    blobs.path(sha256).write_bytes(b"evil")
    with pytest.raises(ValueError, match="no longer matches"):
        blobs.get(sha256)


def test_a_full_disk_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "captions.json"
    write_atomic(target, b"old")

    def no_space(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["captions.json"]
    assert target.read_bytes() == b"old"


def test_what_is_written_can_be_read_by_other_users(tmp_path: Path):
    write_atomic(tmp_path / "report.html", b"page")
    assert (tmp_path / "report.html").stat().st_mode & 0o044 == 0o044

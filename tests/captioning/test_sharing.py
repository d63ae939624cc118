"""Versions pushed to a real S3 server or a folder, and pulled whole into another store."""

import json
import uuid
from pathlib import Path

import pytest
from captioning_examples import Answers, png
from seaweed import KEYS

from captioning import (
    Character,
    DatasetVersion,
    Store,
    UserError,
    caption_all,
    find_dataset,
    freeze,
    observe,
    take_in,
)
from captioning.object_store import ObjectStore, open_objects
from captioning.sharing import pull_version, push_version


@pytest.fixture
def version(pictures: Path, store: Store, aya: Character) -> DatasetVersion:
    return frozen(pictures, store, aya)


def frozen(pictures: Path, store: Store, aya: Character) -> DatasetVersion:
    observe(list(take_in(pictures, store, aya).images), store, Answers())
    caption_all(store, aya)
    return freeze(store, aya)


@pytest.fixture
def share(tmp_path: Path) -> ObjectStore:
    return open_objects(str(tmp_path / "share"))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Store:
    return Store(tmp_path / "elsewhere")


def contents(version: DatasetVersion) -> dict[str, bytes]:
    files = [file for file in version.path.rglob("*") if file.is_file()]
    return {file.relative_to(version.path).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(params=["folder", "s3"])
def objects(
    request: pytest.FixtureRequest, share: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> ObjectStore:
    if request.param == "folder":
        return share
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", request.getfixturevalue("s3_endpoint"))
    return open_objects(f"s3://farm/{uuid.uuid4().hex}")


def test_a_version_comes_out_as_it_went_in(
    pictures: Path,
    store: Store,
    aya: Character,
    version: DatasetVersion,
    objects: ObjectStore,
    elsewhere: Store,
):
    count = len(set(files(version).values()))
    seen = []
    first = push_version(version, objects, lambda done, total: seen.append((done, total)))
    assert (first.sent, first.present) == (count, 0)
    assert seen == [(done, count) for done in range(1, count + 1)]
    again = push_version(version, objects)
    assert (again.sent, again.present) == (0, count)
    (pictures / "7.png").write_bytes(png("blue"))
    second = frozen(pictures, store, aya)
    assert push_version(second, objects).present >= 12  # what both versions share is there once
    for reference, whole in (("aya@v1", version), ("aya", second)):
        pulled, moved = pull_version(reference, objects, elsewhere)
        assert contents(pulled) == contents(whole)
        assert (pulled.name, pulled.manifest_sha256) == (whole.name, whole.manifest_sha256)
        assert pulled.path == elsewhere.datasets / "aya" / whole.name
        assert moved.sent == len(files(whole))
    assert find_dataset(elsewhere, "aya@v2").train[0].caption == second.train[0].caption
    assert pull_version("aya@v1", objects, elsewhere)[1].sent == 0


def files(version: DatasetVersion) -> dict[str, str]:
    return json.loads((version.path / "manifest.json").read_text())["files"]


class Fails:
    """A store whose network breaks after some objects."""

    def __init__(self, inner: ObjectStore, after: int) -> None:
        self.inner, self.left, self.url = inner, after, inner.url

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def put(self, key: str, data: bytes) -> None:
        self._count()
        self.inner.put(key, data)

    def get(self, key: str) -> bytes | None:
        if key.startswith("blobs/"):
            self._count()
        return self.inner.get(key)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise UserError(self.url, "not reachable", "check the network")


def test_a_push_that_broke_goes_on_and_shows_nothing_before_it_is_whole(
    version: DatasetVersion, share: ObjectStore, elsewhere: Store
):
    with pytest.raises(UserError, match="not reachable"):
        push_version(version, Fails(share, 10))
    with pytest.raises(UserError, match="no dataset version of aya there"):
        pull_version("aya", share, elsewhere)
    moved = push_version(version, share)
    assert moved.present >= 1
    assert contents(pull_version("aya", share, elsewhere)[0]) == contents(version)


def test_a_pull_that_broke_goes_on_and_leaves_no_version_before_it_is_whole(
    version: DatasetVersion, share: ObjectStore, elsewhere: Store
):
    push_version(version, share)
    with pytest.raises(UserError, match="not reachable"):
        pull_version("aya", Fails(share, 5), elsewhere)
    with pytest.raises(UserError, match="aya: not known"):
        find_dataset(elsewhere, "aya")
    pulled, moved = pull_version("aya", share, elsewhere)
    assert moved.present >= 1 and contents(pulled) == contents(version)
    assert [path.name for path in pulled.path.parent.iterdir()] == [version.name]


@pytest.mark.parametrize("spoil", ["change", "remove"])
def test_what_was_spoiled_in_the_store_is_never_taken(
    version: DatasetVersion, share: ObjectStore, elsewhere: Store, spoil: str
):
    push_version(version, share)
    sha256 = version.train[0].sha256
    blob = Path(share.url) / "blobs" / sha256[:2] / sha256
    blob.write_bytes(b"other") if spoil == "change" else blob.unlink()
    with pytest.raises(UserError, match=f"{sha256}.* is (changed|missing) there"):
        pull_version("aya", share, elsewhere)
    assert push_version(version, share).sent == 1  # a rotten object is made good
    assert contents(pull_version("aya", share, elsewhere)[0]) == contents(version)


def test_a_store_that_changes_bytes_is_found_out_at_once(
    version: DatasetVersion, share: ObjectStore
):
    class Lies(Fails):
        def put(self, key: str, data: bytes) -> None:
            self.inner.put(key, data[:-1] + b"?")

    with pytest.raises(UserError, match="came back changed"):
        push_version(version, Lies(share, 1000))
    assert list(share.keys("datasets/")) == []


def test_another_version_of_that_name_is_neither_replaced_there_nor_here(
    tmp_path: Path,
    pictures: Path,
    aya: Character,
    version: DatasetVersion,
    share: ObjectStore,
    elsewhere: Store,
):
    for place in pictures.iterdir():  # the same content under other file names: another manifest
        place.rename(pictures / f"x{place.name}")
    other = frozen(pictures, elsewhere, aya)
    assert other.name == version.name and other.manifest_sha256 != version.manifest_sha256
    push_version(version, share)
    for refused in (
        lambda: push_version(other, share),
        lambda: pull_version("aya", share, elsewhere),
    ):
        with pytest.raises(UserError, match="another history"):
            refused()


@pytest.mark.parametrize("name", ["../../evil.txt", "/tmp/evil.txt", "images/../x.txt", "a.sh"])
def test_a_manifest_that_names_other_files_is_refused(
    version: DatasetVersion, share: ObjectStore, elsewhere: Store, name: str
):
    from captioning.manifest import seal_of

    push_version(version, share)
    key = f"datasets/aya/{version.name}/manifest.json"
    manifest = json.loads(share.get(key))
    manifest["files"][name] = version.train[0].sha256
    del manifest["seal"]
    manifest["seal"] = seal_of(manifest)
    share.put(key, json.dumps(manifest).encode())
    with pytest.raises(UserError, match="its list of files is no dataset version's"):
        pull_version("aya", share, elsewhere)
    assert not elsewhere.root.exists()


def test_a_manifest_of_another_version_is_refused(
    version: DatasetVersion, share: ObjectStore, elsewhere: Store
):
    push_version(version, share)
    key = f"datasets/aya/{version.name}/manifest.json"
    share.put("datasets/aya/v0002-00000000/manifest.json", share.get(key))
    with pytest.raises(UserError, match="does not belong"):
        pull_version("aya", share, elsewhere)

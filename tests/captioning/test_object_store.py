"""One contract, two stores: a folder, and a real S3 server."""

import hashlib
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from seaweed import KEYS, READER

from captioning import UserError
from captioning.object_store import ObjectStore, open_objects


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place in the bucket; credentials are in the environment."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_endpoint)
    return f"s3://farm/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return open_objects(str(tmp_path / "share"))
    return open_objects(request.getfixturevalue("s3"))


def test_bytes_come_back_with_their_hash(objects: ObjectStore):
    large = bytes(range(256)) * 4 * 30_000  # 30 MB
    for key, data in {"a/b.bin": large, "empty": b"", "a/ü b+c%.txt": b"text"}.items():
        assert objects.get(key) is None and objects.sha256(key) is None
        objects.put(key, data)
        assert objects.get(key) == data
        assert objects.sha256(key) == hashlib.sha256(data).hexdigest()
    objects.put("empty", b"no more")
    assert objects.get("empty") == b"no more"


def test_keys_are_listed_sorted_by_prefix(objects: ObjectStore):
    assert list(objects.keys("a/")) == []
    for key in ("a/2", "a/1/x", "ab", "b"):
        objects.put(key, b"x")
    assert list(objects.keys("a/")) == ["a/1/x", "a/2"]
    assert list(objects.keys("")) == ["a/1/x", "a/2", "ab", "b"]


def test_a_key_is_won_once(objects: ObjectStore):
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: objects.put_new("lock", b"%d" % n), range(16)))
    assert won.count(True) == 1
    assert objects.get("lock") == b"%d" % won.index(True)
    assert objects.sha256("lock") == hashlib.sha256(objects.get("lock")).hexdigest()
    assert not objects.put_new("lock", b"later")


def test_the_prefix_keeps_places_apart(s3: str):
    open_objects(s3 + "/one").put("key", b"1")
    assert open_objects(s3 + "/two").get("key") is None
    assert list(open_objects(s3).keys("")) == ["one/key"]


def test_what_the_server_refuses_is_said_without_secrets(s3: str, monkeypatch):
    for name, value in READER.items():
        monkeypatch.setenv(name, value)
    reader = open_objects(s3)
    assert reader.get("nothing") is None
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    stranger = open_objects(s3)
    for refused in (
        lambda: reader.put("key", b"x"),
        lambda: reader.put_new("key", b"x"),
        lambda: stranger.get("key"),
        lambda: stranger.sha256("key"),
        lambda: list(stranger.keys("")),
    ):
        with pytest.raises(UserError) as caught:
            refused()
        assert s3 in str(caught.value) and "secret-value" not in str(caught.value)
        assert "not-the-secret" not in str(caught.value) and READER["AWS_ACCESS_KEY_ID"] not in str(
            caught.value
        )


def test_an_unknown_bucket_is_said(s3: str, monkeypatch):
    for name, value in READER.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"NoSuchBucket|AccessDenied"):
        open_objects("s3://no-such-bucket/x").get("key")


def test_a_server_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    for asked in (lambda o: o.get("k"), lambda o: o.put_new("k", b"x")):
        with pytest.raises(UserError, match=r"not reachable.*AWS_ENDPOINT_URL"):
            asked(open_objects("s3://farm/x"))


@pytest.mark.parametrize(
    ("url", "endpoint", "said"),
    [
        ("s3://key:hunter2@bucket/x", None, "holds more than a bucket"),
        ("s3://bucket/x?secret=hunter2", None, "holds more than a bucket"),
        ("s3:///x", None, "no store's URL"),
        ("ftp://bucket/x", None, "no store's URL"),
        ("s3://bucket", "http://key:hunter2@host", "no endpoint's URL"),
        ("s3://bucket", "host:9000", "no endpoint's URL"),
        ("s3://bucket", "http://host/path", "AWS_ENDPOINT_URL"),
    ],
)
def test_a_wrong_url_is_refused_and_never_repeats_a_secret(
    monkeypatch: pytest.MonkeyPatch, url: str, endpoint: str | None, said: str
):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match=said) as caught:
        open_objects(url).get("key")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch, missing: str):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"{missing} is not set"):
        open_objects("s3://farm/x")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not usable"):
        open_objects(str(tmp_path / "file")).put("key", b"x")

"""Where bytes are shared between machines: a folder, or a bucket that speaks S3. Chosen by URL.

`s3://bucket/prefix` or a folder's path in, an `ObjectStore` out. Credentials and the endpoint come
from the environment only (`ENDPOINT_VARIABLES`, `KEY_VARIABLE`, ...): never from a URL or a file,
and they are in no message.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from captioning.errors import UserError
from captioning.store import FILE_MODE, sync_directory, write_atomic

# The names that AWS's own tools read, so that what a studio has set up already is right.
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
KEY_VARIABLE, SECRET_VARIABLE = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
TOKEN_VARIABLE = "AWS_SESSION_TOKEN"
REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")
AWS_ENDPOINT = "https://s3.amazonaws.com"
# A server that does not answer is given up after this; a large object's bytes take their time.
CONNECT_S, READ_S, RETRIES = 10.0, 120.0, 3
# Up to this an object is put in one request, which stores keep whole or not at all.
PART_BYTES = 64 * 1024 * 1024
# How long the signed address of a conditional put is good for; it is used at once.
SIGNED_FOR = timedelta(minutes=5)
HASH_METADATA = "sha256"


class ObjectStore(Protocol):
    """Objects of bytes by key (forward slashes, as `blobs/ab/abcd`); each is whole or absent.

    All methods raise UserError when the store cannot be reached or refuses.
    """

    url: str

    def get(self, key: str) -> bytes | None:
        """The object's bytes; None when there is no such object."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Store `data` in place of what was there."""
        ...

    def put_new(self, key: str, data: bytes) -> bool:
        """Store `data` unless the key is there; of several writers at once one gets True."""
        ...

    def sha256(self, key: str) -> str | None:
        """The hash of the object's bytes as they were put; None when there is no such object."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys that begin with `prefix`, sorted."""
        ...


def open_objects(url: str) -> ObjectStore:
    """The store at `s3://bucket/prefix`, or in the folder of that path.

    Raises UserError for another scheme, for credentials inside the URL, and when an S3 store's
    credentials are not in the environment.
    """
    if "://" not in url:
        return FolderObjects(Path(url).expanduser())
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None or parts.query:
        raise UserError(
            "the store's URL",
            "it holds more than a bucket and a prefix",
            f"write s3://bucket/prefix, with credentials in {KEY_VARIABLE} and {SECRET_VARIABLE}",
        )
    if parts.scheme != "s3" or not parts.netloc:
        raise UserError(url, "no store's URL", "write s3://bucket/prefix, or a folder's path")
    return S3Objects(parts.netloc, parts.path.strip("/"))


class FolderObjects:
    """Objects as files under a folder, such as a network share."""

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, str(root)

    def get(self, key: str) -> bytes | None:
        with self._said():
            path = self.root / key
            return path.read_bytes() if path.is_file() else None

    def put(self, key: str, data: bytes) -> None:
        with self._said():
            write_atomic(self.root / key, data)

    def put_new(self, key: str, data: bytes) -> bool:
        path = self.root / key
        with self._said():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), FILE_MODE)
                try:
                    os.link(file.name, path)  # refuses a name that is taken, unlike a rename
                except FileExistsError:
                    return False
            sync_directory(path.parent)
        return True

    def sha256(self, key: str) -> str | None:
        data = self.get(key)
        return None if data is None else hashlib.sha256(data).hexdigest()

    def keys(self, prefix: str) -> Iterator[str]:
        with self._said():
            folder = self.root / prefix.rpartition("/")[0]
            found = [path.relative_to(self.root) for path in folder.rglob("*") if path.is_file()]
        for key in sorted(path.as_posix() for path in found if not path.name.startswith(".")):
            if key.startswith(prefix):
                yield key

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                self.url, f"not usable: {error.strerror}", "check the folder and its permissions"
            ) from error


class S3Objects:
    """Objects in a bucket: AWS, MinIO, SeaweedFS or any other server with conditional puts."""

    def __init__(self, bucket: str, prefix: str) -> None:
        import minio
        import urllib3

        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        endpoint = _first(ENDPOINT_VARIABLES) or AWS_ENDPOINT
        place = urlsplit(endpoint)
        if place.scheme not in ("http", "https") or not place.hostname or place.username:
            raise UserError(
                " or ".join(ENDPOINT_VARIABLES),
                "no endpoint's URL",
                "write http://host:port or https://host, without credentials in it",
            )
        for name in (KEY_VARIABLE, SECRET_VARIABLE):
            if not os.environ.get(name):
                raise UserError(
                    self.url,
                    f"{name} is not set",
                    f"set {KEY_VARIABLE} and {SECRET_VARIABLE} in the environment",
                )
        self._http = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=CONNECT_S, read=READ_S),
            retries=urllib3.Retry(RETRIES, backoff_factor=0.2, status_forcelist=[500, 502, 503]),
            maxsize=16,
        )
        # AWS's buckets have their region found; other servers take what is signed.
        region = _first(REGION_VARIABLES) or (None if endpoint == AWS_ENDPOINT else "us-east-1")
        try:
            self._client = minio.Minio(
                place.netloc,
                access_key=os.environ[KEY_VARIABLE],
                secret_key=os.environ[SECRET_VARIABLE],
                session_token=os.environ.get(TOKEN_VARIABLE),
                secure=place.scheme == "https",
                region=region,
                http_client=self._http,
            )
        except ValueError as error:
            raise UserError(" or ".join(ENDPOINT_VARIABLES), str(error), "correct it") from error

    def get(self, key: str) -> bytes | None:
        import minio

        with self._said():
            try:
                answer = self._client.get_object(self._bucket, self._prefix + key)
            except minio.S3Error as error:
                if error.code == "NoSuchKey":
                    return None
                raise
            try:
                return answer.read()
            finally:
                answer.close()
                answer.release_conn()

    def put(self, key: str, data: bytes) -> None:
        with self._said():
            self._client.put_object(
                self._bucket,
                self._prefix + key,
                io.BytesIO(data),
                len(data),
                metadata={HASH_METADATA: hashlib.sha256(data).hexdigest()},
                part_size=PART_BYTES,
            )

    def put_new(self, key: str, data: bytes) -> bool:
        with self._said():
            # The SDK's own put cannot be made conditional; a signed address can.
            address = self._client.get_presigned_url(
                "PUT", self._bucket, self._prefix + key, expires=SIGNED_FOR
            )
            answer = self._http.request(
                "PUT", address, body=data, headers={"If-None-Match": "*"}, redirect=False
            )
        if answer.status == 412:  # Precondition Failed: the key is there
            return False
        if answer.status != 200:
            raise UserError(
                self.url,
                f"the conditional put of {key} was answered with status {answer.status}",
                "check the permissions; the server must know If-None-Match on puts",
            )
        return True

    def sha256(self, key: str) -> str | None:
        import minio

        with self._said():
            try:
                found = self._client.stat_object(self._bucket, self._prefix + key)
            except minio.S3Error as error:
                if error.code == "NoSuchKey":
                    return None
                raise
        recorded = (found.metadata or {}).get(f"x-amz-meta-{HASH_METADATA}")
        if recorded:
            return str(recorded)
        data = self.get(key)  # put by something else, or conditionally
        return None if data is None else hashlib.sha256(data).hexdigest()

    def keys(self, prefix: str) -> Iterator[str]:
        with self._said():
            for found in self._client.list_objects(
                self._bucket, self._prefix + prefix, recursive=True
            ):
                yield str(found.object_name).removeprefix(self._prefix)

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What servers and networks answer, as a UserError without any secret in it."""
        import minio.error
        import urllib3

        try:
            yield
        except minio.S3Error as error:
            raise UserError(
                self.url, f"the store answered {error.code}", _fix(error.code)
            ) from None
        except (minio.error.MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            where = " or ".join(ENDPOINT_VARIABLES)
            raise UserError(
                self.url,
                f"not reachable ({type(error).__name__})",
                f"check {where} and the network",
            ) from None


def _fix(code: str | None) -> str:
    if code == "NoSuchBucket":
        return "create the bucket first, or correct its name"
    if code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
        return f"check {KEY_VARIABLE}, {SECRET_VARIABLE} and what they may do in the bucket"
    return "try again; it goes on from what is done"


def _first(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)

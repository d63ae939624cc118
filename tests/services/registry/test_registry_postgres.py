"""Runs and registry in a real PostgreSQL server, started for the test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry_examples import CARD

from services.registry.registry import Registry

START_TIMEOUT_S = 60


def program(name: str) -> str | None:
    """Debian keeps PostgreSQL's programs out of PATH, one folder for each version."""
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(installed[-1]) if installed else None)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.postgres,
    pytest.mark.skipif(program("initdb") is None, reason="no PostgreSQL server is installed"),
]


@pytest.fixture
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a fresh server's database, on a free port of the loopback interface."""
    # The server refuses to run as root, and its user must be able to enter the folder.
    folder = Path(tmp_path_factory.mktemp("pg"))
    user = []
    if os.geteuid() == 0:
        user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        shutil.chown(folder, "nobody", "nogroup")
        for parent in list(folder.parents)[:3]:
            if parent.stat().st_uid == 0 and parent != Path("/tmp"):
                parent.chmod(0o755)
    data = folder / "data"
    subprocess.run(
        [*user, program("initdb"), "-D", data, "-U", "mlflow", "-A", "trust", "--no-sync"],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*user, program("postgres"), "-D", data, "-h", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(
        [*command, "-k", "", "-F"], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None and time.monotonic() < deadline, "it did not start"
            time.sleep(0.1)
        yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # "fast": it does not wait for open connections
        server.wait(30)


def test_an_adapter_is_registered_promoted_and_fetched(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    registry = Registry(database, tmp_path / "mlartifacts")
    weights = tmp_path / "aya.safetensors"
    weights.write_bytes(b"kohya weights")
    run = registry.runs.open_sweep("aya", "s1")
    version = registry.register("aya.sd15", run, {"kohya": weights}, CARD)
    assert registry.register("aya.sd15", run, {"kohya": weights}, CARD) == version
    registry.set_alias("aya.sd15", version, "production")

    again = Registry(database, tmp_path / "mlartifacts")
    adapter, fetched = again.download("aya.sd15@production", tmp_path / "out", "kohya")
    assert adapter.version == version
    assert [file.read_bytes() for file in fetched] == [b"kohya weights"]
    assert not list(elsewhere.iterdir()), "no file may land where the command happens to run"

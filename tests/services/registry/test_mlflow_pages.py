"""MLflow's pages: served while somebody looks, refused with a reason, ended by Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from captioning import UserError
from services.farm.settings import open_home
from services.registry.mlflow_pages import HOST, require_free_port, running_pages
from services.registry.registry import Registry


def test_a_farm_without_runs_is_told_how_to_get_some(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="no runs yet"),
        running_pages(open_home(tmp_path), free_port()),
    ):
        pass


@pytest.mark.slow
def test_the_pages_are_served_until_ctrl_c(tmp_path: Path) -> None:
    Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "mlartifacts")
    port = free_port()
    command = [sys.executable, "-m", "services.cli", "mlflow", "--port", str(port)]
    with subprocess.Popen(
        [*command, "--home", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # so that no signal of theirs reaches the tests
    ) as program:
        try:
            assert answers(f"http://{HOST}:{port}/health")
            program.send_signal(signal.SIGINT)
            out, _ = program.communicate(timeout=120)  # until every process of theirs has ended
        finally:
            program.terminate()
    assert program.returncode == 130
    assert f"MLflow at http://{HOST}:{port}" in out and "stopped" in out
    require_free_port(port)  # the server went with the command


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def answers(url: str, timeout_s: float = 240.0) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status == 200
        except OSError:
            time.sleep(0.5)
    return False

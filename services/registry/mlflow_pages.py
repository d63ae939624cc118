"""Serves MLflow's own pages on the farm's runs and registry, on this machine only."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from captioning import UserError
from services.farm.settings import Home

HOST = "127.0.0.1"
# MLflow's jobs evaluate language models. Their seven processes can outlive a server that ends while
# they start; whoever wants them sets the variable.
WITHOUT_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@contextmanager
def running_pages(home: Home, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run `mlflow server` on 127.0.0.1:`port` while the block lasts; gives its process.

    The server ends with the block, also after Ctrl-C. Raises UserError when the port is taken or
    the farm holds no runs yet.
    """
    require_free_port(port)
    if home.settings.tracking_uri is None and not (home.path / "mlflow.db").exists():
        raise UserError(
            str(home.path), "no runs yet", "run `lorafarm sweep <character>` or `lorafarm demo`"
        )
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", home.tracking_uri, "--workers", "1"]
    command += ["--artifacts-destination", str(home.artifacts)]
    environment = WITHOUT_JOBS | os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    with subprocess.Popen(command, env=environment) as process:
        try:
            yield process
        finally:
            process.terminate()  # does nothing to a process that has ended
            process.wait()


def require_free_port(port: int) -> None:
    """Raise UserError when something listens on 127.0.0.1:`port` already."""
    with socket.socket() as probe:
        # A port in TIME_WAIT after a restart counts as free, as it does for servers.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError as error:
            raise UserError(
                f"--port {port}", "this port needs root", "choose one of 1024 or more"
            ) from error
        except OSError as error:
            raise UserError(
                f"--port {port}",
                "another program listens there already",
                f"choose another one, such as `--port {_free_port()}`, or stop that program",
            ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port

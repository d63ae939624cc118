"""Starts Ray for one command and stops it again, whatever happens in between.

Local by default: a private Ray in this machine, without dashboard, that ends with the process.
With an address the same program joins a cluster instead and leaves it running at the end.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from captioning import UserError
from services.farm.settings import Home

# Ray puts objects that pass between processes there; ours are picture bytes and small events.
OBJECT_STORE_BYTES = 256 * 1024 * 1024
LOCK_FILE = ".lock"
TOKEN_FILE = "ray_token"
TOKEN_BYTES = 32

# Quiet and lean: no usage reports, no watchers for cloud preemption, no per-run metrics exporter.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    # Ray's workers would run at nice 15 and starve beside anything else on the machine.
    "RAY_worker_niceness": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@contextmanager
def running_ray(home: Home) -> Iterator[None]:
    """Have Ray running inside the whole `with` block; see `ray_when_needed`."""
    with ray_when_needed(home) as start:
        start()
        yield


@contextmanager
def ray_when_needed(home: Home) -> Iterator[Callable[[], None]]:
    """Hold the home's lock; the function given to the `with` block starts Ray when first called.

    A command that finds everything done then ends in seconds. Local mode starts as many logical
    CPUs as one worker group needs. Token authentication is on in both modes; the local token is
    the home's own file, readable by its owner only. The function raises UserError when a cluster's
    address does not answer.
    """
    with _alone(home.path), ExitStack() as started:

        def start() -> None:
            os.environ.update(_ENVIRONMENT)  # before Ray is imported
            os.environ["RAY_AUTH_MODE"] = "token"
            import ray

            if ray.is_initialized():
                return
            started.enter_context(redirect_stdout(_WithoutServeNoise(sys.stdout)))
            started.callback(ray.shutdown)
            _start(home)

        yield start


class _WithoutServeNoise:
    """stdout without the two lines that Ray prints whenever Serve is shut down in good order.

    Requests to the controller that are open at that moment are reported as failed, whatever the
    log level; everything else that Ray says there (a worker killed for memory, say) passes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        is_end_of_dropped = self._dropped and text == "\n"  # print() writes it by itself
        self._dropped = "(raylet)" in text and "Task ServeController." in text
        if self._dropped or is_end_of_dropped:
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _start(home: Home) -> None:
    import ray

    address = home.settings.ray_address
    try:
        if address == "local":
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(_local_token(home.path))
            ray.init(
                address="local",
                num_cpus=home.settings.cpus_per_worker * home.settings.workers,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError(
            "settings.yaml: ray_address",
            f"no Ray cluster answers at {address!r} ({error})",
            "start it, correct the address, or set it to 'local'",
        ) from error


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Hold the home's lock: two commands at once would train the same trials twice."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go with the process
        except BlockingIOError as error:
            raise UserError(
                str(home),
                "another lorafarm command is working in it",
                "wait for it, or give this one another home",
            ) from error
        yield


def _local_token(home: Path) -> Path:
    """The home's Ray token, made on first use with mode 0600."""
    path = home / TOKEN_FILE
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        # O_EXCL: of two first commands at once one makes the token and the other one reads it.
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return path
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(TOKEN_BYTES))
    return path

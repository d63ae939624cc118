"""Opens MLflow quietly: the farm's own SQLite store, or a tracking server by its address.

A tracking URI in, a client out. A new SQLite store is built under a temporary name and renamed
when whole, so that a process killed meanwhile leaves no half-migrated database behind.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from captioning import UserError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SQLITE_PREFIX = "sqlite:///"
UNFINISHED_PREFIX = ".mlflow-new-"
# MLflow announces its tables and migrations at INFO; a person asked for none of that.
_CHATTY_LOGGERS = ("mlflow", "alembic")


def open_client(tracking_uri: str, artifacts: Path | None) -> MlflowClient:
    """Return a client for `tracking_uri`; an embedded store is created on first use (seconds).

    `artifacts` is the embedded store's artifact folder, and unused with a tracking server.
    Raises UserError for an empty URI, a store of another MLflow version, or a file that is none.
    """
    if not tracking_uri.strip():
        raise UserError(
            "tracking_uri",
            "an empty address",
            "leave it out for the embedded store, or give a server such as http://host:5000",
        )
    # Telemetry sets and unsets an environment variable from a thread, which can raise out of
    # log_batch; asynchronous logging loses rows under load. Both were measured, both stay off.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.tracking import MlflowClient

    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    database = database_file(tracking_uri)
    if database is not None:
        with store_lock(tracking_uri):
            if not database.exists():
                _create_database(database, artifacts or database.parent / "mlartifacts")
        _require_readable(tracking_uri, database)
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def database_file(tracking_uri: str) -> Path | None:
    """The file of an embedded store, or None for a tracking server or another database."""
    if not tracking_uri.startswith(SQLITE_PREFIX):
        return None
    return Path(tracking_uri.removeprefix(SQLITE_PREFIX))


@contextmanager
def store_lock(tracking_uri: str) -> Iterator[None]:
    """Hold the embedded store's lock, so that two commands do not register or promote at once.

    A tracking server has no such lock: there, run one promoting command at a time.
    """
    database = database_file(tracking_uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with (database.parent / f"{database.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go when the process dies
        yield


def _create_database(database: Path, artifacts: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for left_by_a_killed_process in database.parent.glob(f"{UNFINISHED_PREFIX}*"):
        shutil.rmtree(left_by_a_killed_process)
    with tempfile.TemporaryDirectory(dir=database.parent, prefix=UNFINISHED_PREFIX) as folder:
        unfinished = Path(folder) / database.name
        store = SqlAlchemyStore(f"{SQLITE_PREFIX}{unfinished}", artifacts.resolve().as_uri())
        store.engine.dispose()
        unfinished.replace(database)


def _require_readable(tracking_uri: str, database: Path) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import DatabaseError

    try:
        MlflowClient(tracking_uri=tracking_uri).search_experiments(max_results=1)
    except (MlflowException, DatabaseError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            str(database),
            f"MLflow cannot read it ({reason})",
            f"after an MLflow update run `mlflow db upgrade {SQLITE_PREFIX}{database}` on a "
            "backed-up file; otherwise move the file away and a new store is made",
        ) from error

"""The list of registered adapters, kept until the registry changes.

A tracking URI in, adapter versions out. Importing MLflow takes longer than all else that a list
needs, so the one that MLflow gave is kept beside the embedded database, with a hash of the rows
that it was made from. While the rows are the same, so is the list. Only MLflow says what the rows
mean: this file compares rows and does not interpret them. A tracking server is asked each time.
"""

from __future__ import annotations

import errno
import hashlib
import sqlite3
from contextlib import closing
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from captioning import write_atomic
from services.registry.bundle import AdapterVersion
from services.registry.mlflow_store import database_file
from services.registry.registry import Registry

LISTED_FILE = "registered-adapters.json"
READ_ONLY_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS)
# The beginnings of the names of the tables that the registry is in, and the schema's version.
_TABLES = ("registered_model", "model_version", "alembic_version")


class _Listed(BaseModel):
    """The list as it was when the rows were these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: str
    adapters: tuple[AdapterVersion, ...]


def registered_adapters(tracking_uri: str, artifacts: Path | None) -> tuple[AdapterVersion, ...]:
    """Every version of every adapter, as `Registry.list` gives it; UserError as from `Registry`."""
    database = database_file(tracking_uri)
    rows = None if database is None else _rows(database)
    if database is None or rows is None:
        return Registry(tracking_uri, artifacts).list()
    kept = _read(database.parent / LISTED_FILE)
    if kept is not None and kept.rows == rows:
        return kept.adapters
    return _listed_anew(database, rows, Registry(tracking_uri, artifacts))


def keep_list(tracking_uri: str, registry: Registry) -> None:
    """Keep the list after a change, where MLflow is loaded anyway, for whoever asks next."""
    database = database_file(tracking_uri)
    rows = None if database is None else _rows(database)
    if database is not None and rows is not None:
        _listed_anew(database, rows, registry)


def _listed_anew(database: Path, rows: str, registry: Registry) -> tuple[AdapterVersion, ...]:
    """The list as MLflow gives it, kept beside the database, whose rows had the hash `rows`."""
    adapters = registry.list()
    if _rows(database) == rows:  # else they were changed while MLflow read them
        _keep(database.parent / LISTED_FILE, _Listed(rows=rows, adapters=adapters))
    return adapters


def _keep(file: Path, listed: _Listed) -> None:
    """Write the list down; a home that may only be read is listed without."""
    try:
        write_atomic(file, (listed.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        if error.errno not in READ_ONLY_ERRORS:
            raise


def _read(file: Path) -> _Listed | None:
    """The list that was kept; None if there is none, or none that this version can read."""
    try:
        return _Listed.model_validate_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def _rows(database: Path) -> str | None:
    """A hash of the registry's rows and MLflow's version; None where SQLite cannot read them.

    MLflow is then asked, and says in its own words what is wrong.
    """
    if not database.exists():
        return None
    digest = hashlib.sha256(metadata.version("mlflow").encode())
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as opened:
            opened.execute("BEGIN")  # all tables as they are at one moment
            named = opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = sorted(name for (name,) in named if name.startswith(_TABLES))
            for table in tables:
                rows = sorted(map(repr, opened.execute(f'SELECT * FROM "{table}"')))
                digest.update(repr((table, rows)).encode())
    except sqlite3.Error:
        return None
    return digest.hexdigest() if tables else None

"""The list of registered adapters, kept until the registry changes.

A tracking URI in, adapter versions out. Importing MLflow takes longer than all else that a list
needs, so the one that MLflow gave is kept beside the embedded database, with a hash of the rows
that it was made from. While the rows are the same, so is the list. Only MLflow says what the rows
mean: they are compared here and never understood. A tracking server is asked each time.
"""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing, suppress
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from captioning import write_atomic
from services.registry.bundle import AdapterVersion
from services.registry.mlflow_store import database_file
from services.registry.registry import Registry

LISTED_FILE = "registered-adapters.json"
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
    file = database.parent / LISTED_FILE
    kept = _read(file)
    if kept is not None and kept.rows == rows:
        return kept.adapters
    adapters = Registry(tracking_uri, artifacts).list()
    if _rows(database) == rows:  # else they were changed while MLflow read them
        listed = _Listed(rows=rows, adapters=adapters)
        with suppress(PermissionError):  # a home that may only be read is listed all the same
            write_atomic(file, (listed.model_dump_json(indent=1) + "\n").encode())
    return adapters


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

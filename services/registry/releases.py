"""Registered versions in people's hands: an alias moved, a version's files put into a folder.

A home and a reference such as `aya.sd15@production` in; moved aliases and verified files out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from captioning import UserError, content_hash
from services.farm.settings import Home
from services.registry.bundle import FORMATS, AdapterVersion
from services.registry.listing import keep_list
from services.registry.registry import CANDIDATE, PRODUCTION, Registry

# The aliases that people move; `previous` follows `production` by itself.
ALIASES = (CANDIDATE, PRODUCTION)


@dataclass(frozen=True)
class Promotion:
    """An alias that points at a version now."""

    name: str
    alias: str
    version: int
    has_lock: bool  # False: on a tracking server nothing keeps two commands from promoting at once


def promote(home: Home, name: str, version: int, alias: str = PRODUCTION) -> Promotion:
    """Point `alias` at a version; what `production` pointed to becomes `previous`.

    Raises UserError for an unknown name, version or alias.
    """
    if alias not in ALIASES:
        raise UserError(f"alias {alias}", "no such alias", f"use one of: {', '.join(ALIASES)}")
    registry = open_registry(home)
    registry.set_alias(name, version, alias)
    keep_list(home.tracking_uri, registry)
    return Promotion(name, alias, version, registry.has_lock)


@dataclass(frozen=True)
class HandedOut:
    """A version's files of one format, as they lie in a folder now."""

    adapter: AdapterVersion
    files: tuple[tuple[Path, str], ...]  # each file with its sha256

    @property
    def trigger(self) -> str:
        return self.adapter.tags["trigger"]


def hand_out(home: Home, reference: str, to: Path, format: str) -> HandedOut:
    """Put a version's files of one format ("kohya" or "diffusers") into the folder `to`.

    Raises UserError for an unknown reference or format, and for bytes that were changed.
    """
    if format not in FORMATS:
        raise UserError(f"format {format}", "unknown", f"use one of: {', '.join(sorted(FORMATS))}")
    adapter, files = open_registry(home).download(reference, to, format)
    return HandedOut(adapter, tuple((file, content_hash(file)) for file in files))


def open_registry(home: Home) -> Registry:
    """The farm's registry; UserError when nothing was ever registered in the embedded one."""
    if home.settings.tracking_uri is None and not (home.path / "mlflow.db").exists():
        raise UserError(
            str(home.path), "nothing is registered yet", "run `lorafarm sweep <character>` first"
        )
    return Registry(home.tracking_uri, home.artifacts)

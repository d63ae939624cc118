"""The registry: adapter versions under names such as `aya.sd15`, with aliases that tools follow.

Exported files in, numbered versions out, and back to verified files. One checkpoint makes one
version, however often it is registered; a version is never edited, only aliases move.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import UserError
from services.registry.bundle import (
    CARD_FILE,
    CHECKPOINT_TAG,
    FILES_TAG,
    FORMATS,
    AdapterCard,
    AdapterVersion,
    bundle_files,
    card_json,
    describe_file,
    file_sha256,
    files_from_tag,
    files_tag,
    format_of,
)
from services.registry.mlflow_runs import MlflowRuns
from services.registry.mlflow_store import database_file, open_client, store_lock

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

PRODUCTION, PREVIOUS, CANDIDATE = "production", "previous", "candidate"
# MLflow keeps `latest` and v<number> for itself.
_ALIAS = re.compile(r"(?!latest$|v\d+$)[a-z][a-z0-9_-]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Registry:
    """Adapter versions and aliases; `runs` holds the MLflow runs they come from."""

    def __init__(self, tracking_uri: str, artifacts: Path | None = None) -> None:
        """Open (and, for `sqlite:///...`, create) the store; UserError when it cannot be read.

        `artifacts` is where files go when `tracking_uri` is a database; a server has its own place.
        """
        self._tracking_uri = tracking_uri
        self._client = open_client(tracking_uri, artifacts)
        is_database = not tracking_uri.startswith(("http:", "https:"))
        #: Whether two commands cannot move aliases at once; see `store_lock`.
        self.has_lock = database_file(tracking_uri) is not None
        self.runs = MlflowRuns(self._client, artifacts if is_database else None)

    def register(self, name: str, run_id: str, files: Mapping[str, Path], card: AdapterCard) -> int:
        """Keep `files` with the run and return the number of the version that serves them.

        A key of `files` says what it is ("kohya", "diffusers", "manifest", "preview"); a file is
        kept under its own name, so that a preview stays beside its adapter, a folder under its
        key. The same checkpoint never makes a second version: the first one's number is returned.
        Raises UserError for an impossible name, ValueError when two files have the same name.
        """
        if not _NAME.fullmatch(name):
            raise UserError(
                f"adapter name {name!r}",
                "not a name the registry takes",
                "use letters, digits, '.', '_' and '-', such as 'aya.sd15'",
            )
        with store_lock(self._tracking_uri):
            known = self._version_of(name, card.checkpoint_sha256)
            if known is not None:
                return known
            bundle = bundle_files(files)
            described = [describe_file(path, file) for path, file in sorted(bundle.items())]
            folder = f"adapters/{card.checkpoint_sha256[:16]}"
            with tempfile.TemporaryDirectory() as temporary:
                card_file = Path(temporary) / CARD_FILE
                card_file.write_text(card_json(name, run_id, card, described), encoding="utf-8")
                described.append(describe_file(CARD_FILE, card_file))
                self.runs.push_folder(run_id, folder, {**bundle, CARD_FILE: card_file})
            self._ensure_model(name, card)
            tags = card.tags() | {
                "formats": ",".join(sorted(set(files) & FORMATS)),
                FILES_TAG: files_tag(described),
            }
            created = self._client.create_model_version(
                name, self.runs.artifact_uri(run_id, folder), run_id=run_id, tags=tags
            )
            return int(created.version)

    def set_alias(self, name: str, version: int, alias: str) -> None:
        """Let `alias` point to `version`; what `production` pointed to becomes `previous`.

        Doing it twice changes nothing. Rolling back is `set_alias(name, n, "production")` with
        the version of `previous`. Raises UserError for an unknown name or version, a bad alias.
        """
        if not _ALIAS.fullmatch(alias):
            raise UserError(
                f"alias {alias!r}",
                "not an alias the registry takes",
                f"use lower-case letters, digits, '_' and '-', such as '{CANDIDATE}'; 'latest' and "
                "'v1' are taken",
            )
        with store_lock(self._tracking_uri):
            aliases = self._aliases(name)
            self._require_version(name, version)
            current = aliases.get(alias)
            if current == version:
                return
            if alias == PRODUCTION and current is not None:
                # This first: a process killed here leaves production as it was, and is repeated.
                self._client.set_registered_model_alias(name, PREVIOUS, str(current))
            self._client.set_registered_model_alias(name, alias, str(version))

    def resolve(self, reference: str) -> AdapterVersion:
        """The version behind "aya.sd15@production" or "aya.sd15/3".

        Raises UserError that lists the names, aliases or versions there are.
        """
        name, separator, which = _split(reference)
        aliases = self._aliases(name)
        if separator == "@":
            if which not in aliases:
                known = ", ".join(f"@{alias} (version {aliases[alias]})" for alias in aliases)
                raise UserError(
                    reference,
                    f"{name} has no alias {which!r}",
                    _did_you_mean(which, aliases) + f"it has: {known or 'none yet'}",
                )
            return self._read(name, aliases[which])
        return self._read(name, self._require_version(name, int(which)))

    def versions(self, name: str) -> tuple[AdapterVersion, ...]:
        """All versions of an adapter, newest first. Raises UserError for an unknown name."""
        aliases = self._aliases(name)
        found = (_adapter(entry, aliases) for entry in self._search(f"name = '{name}'"))
        return tuple(sorted(found, key=lambda adapter: -adapter.version))

    def list(self) -> tuple[AdapterVersion, ...]:
        """Every version of every adapter, by name, newest first."""
        return tuple(adapter for name in self.names() for adapter in self.versions(name))

    def names(self) -> tuple[str, ...]:
        """The names of all registered adapters, sorted."""
        models = _all_pages(lambda token: self._client.search_registered_models(page_token=token))
        return tuple(sorted(model.name for model in models))

    def download(
        self, reference: str, folder: Path, format: str | None = None
    ) -> tuple[AdapterVersion, tuple[Path, ...]]:
        """Put the version's files into `folder`, each verified by sha256 before it appears there.

        With a `format` ("kohya" or "diffusers") only the adapter in that form. Files that are
        there already and match are left alone. Raises UserError when bytes in the registry do not
        match what was registered, when the version lacks the format, and as `resolve` does.
        """
        from mlflow.artifacts import download_artifacts

        adapter = self.resolve(reference)
        wanted = [e for e in adapter.files if format is None or format_of(e.path) == format]
        if not wanted:
            raise UserError(
                f"{adapter.name}/{adapter.version}",
                f"it has no {format} file",
                f"it was registered with: {adapter.tags.get('formats') or 'no adapter file'}",
            )
        folder.mkdir(parents=True, exist_ok=True)
        placed = []
        for entry in wanted:
            target = folder / entry.path
            if not (target.is_file() and file_sha256(target) == entry.sha256):
                with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as incoming:
                    fetched = Path(
                        download_artifacts(
                            artifact_uri=f"{adapter.source}/{entry.path}",
                            dst_path=incoming,
                            tracking_uri=self._tracking_uri,
                        )
                    )
                    found = file_sha256(fetched)
                    if found != entry.sha256:
                        raise UserError(
                            f"{adapter.name}/{adapter.version}: {entry.path}",
                            f"sha256 {found[:12]}…, registered as {entry.sha256[:12]}…",
                            "the registry's artifact was changed or damaged; export the "
                            "checkpoint again or use another version",
                        )
                    target.parent.mkdir(parents=True, exist_ok=True)
                    fetched.replace(target)
            placed.append(target)
        return adapter, tuple(placed)

    def _aliases(self, name: str) -> dict[str, int]:
        """Alias to version, from the model itself: version searches return no aliases."""
        from mlflow.exceptions import MlflowException

        try:
            model = self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            names = self.names()
            raise UserError(
                f"adapter {name!r}",
                "not registered",
                _did_you_mean(name, names) + f"registered are: {', '.join(names) or 'none yet'}",
            ) from error
        return {alias: int(version) for alias, version in sorted(model.aliases.items())}

    def _require_version(self, name: str, version: int) -> int:
        known = sorted(int(entry.version) for entry in self._search(f"name = '{name}'"))
        if version not in known:
            raise UserError(
                f"{name}/{version}",
                "there is no such version",
                f"{name} has: {', '.join(map(str, known)) or 'none yet'}",
            )
        return version

    def _version_of(self, name: str, checkpoint_sha256: str) -> int | None:
        found = self._search(f"name = '{name}' AND tag.{CHECKPOINT_TAG} = '{checkpoint_sha256}'")
        return min((int(entry.version) for entry in found), default=None)

    def _search(self, filter_string: str) -> Sequence[ModelVersion]:
        return _all_pages(
            lambda token: self._client.search_model_versions(filter_string, page_token=token)
        )

    def _read(self, name: str, version: int) -> AdapterVersion:
        entry = self._client.get_model_version(name, str(version))
        return _adapter(entry, self._aliases(name))

    def _ensure_model(self, name: str, card: AdapterCard) -> None:
        if name not in self.names():
            tags = {"character": card.character, "family": card.family}
            self._client.create_registered_model(name, tags=tags)


def _all_pages(fetch: Callable[[str | None], Any]) -> list[Any]:
    """Every entry of an MLflow listing; `fetch` takes a page's token, None for the first one."""
    entries: list[Any] = []
    token: str | None = None
    while True:
        page = fetch(token)
        entries.extend(page)
        token = page.token
        if not token:
            return entries


def _split(reference: str) -> tuple[str, str, str]:
    """ "aya.sd15@production" as ("aya.sd15", "@", "production"); likewise with "/3"."""
    match = re.fullmatch(r"([^@/]+)(?:(@)([^@/]+)|(/)(\d+))", reference)
    if match is None:
        raise UserError(
            f"adapter {reference!r}",
            "neither name@alias nor name/version",
            "write it as 'aya.sd15@production' or 'aya.sd15/3'; `lorafarm status` lists them",
        )
    name, at, alias, slash, version = match.groups()
    return name, at or slash, alias or version


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _adapter(entry: ModelVersion, aliases: Mapping[str, int]) -> AdapterVersion:
    version = int(entry.version)
    return AdapterVersion(
        name=entry.name,
        version=version,
        aliases=tuple(alias for alias, target in aliases.items() if target == version),
        run_id=entry.run_id or "",
        source=entry.source,
        files=files_from_tag(f"{entry.name}/{version}", entry.tags.get(FILES_TAG, "{}")),
        tags={key: value for key, value in entry.tags.items() if key != FILES_TAG},
    )

"""What a registered adapter is made of: its card, its files and their hashes.

Exported files and facts in, the bundle that the registry keeps out. Reads the files it is given,
writes none and talks to no server.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from services.registry.trial_facts import public_value
from training import Measures

CARD_FILE = "adapter.json"
CARD_SCHEMA = "lorafarm-adapter/1"
FILES_TAG = "files"
CHECKPOINT_TAG = "checkpoint_sha256"
FORMATS = frozenset({"kohya", "diffusers"})


@dataclass(frozen=True)
class AdapterCard:
    """What is said about an adapter when it is registered."""

    character: str
    family: str  # "sd15"
    checkpoint_sha256: str
    trial: str
    step: int
    method: str  # "lora" | "dora"
    rank: int
    base: str
    base_hash: str
    dataset: str  # "aya/v0001-1a2b3c4d"
    trigger: str
    class_word: str
    recommended_weight: float
    scores: Measures
    approximate: str = ""  # in what way, for an adapter cut from a run of nested ranks

    def tags(self) -> dict[str, str]:
        """The card as a version's tags, measures as "value [low, high]"."""
        plain = {
            "character": self.character,
            "family": self.family,
            CHECKPOINT_TAG: self.checkpoint_sha256,
            "trial": self.trial,
            "step": str(self.step),
            "method": self.method,
            "rank": str(self.rank),
            "base": public_value(self.base),
            "base_hash": self.base_hash,
            "dataset": self.dataset,
            "trigger": self.trigger,
            "class_word": self.class_word,
            "recommended_weight": f"{self.recommended_weight:g}",
        }
        if self.approximate:
            plain["approximate"] = self.approximate
        return plain | {
            name: f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
            for name, interval in self.scores.items()
        }


@dataclass(frozen=True)
class AdapterFile:
    """One file of a version, relative to the version's folder."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class AdapterVersion:
    """A registered adapter: `name/version`, what is known about it, and its files."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    source: str  # where the files lie, as MLflow names it
    files: tuple[AdapterFile, ...]
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def trial(self) -> str:
        return self.tags["trial"]

    @property
    def step(self) -> int:
        return int(self.tags["step"])

    @property
    def identity(self) -> str:
        """The identity with its interval, as "0.62 [0.55, 0.70]"."""
        return self.tags.get("identity", "")


def bundle_files(files: Mapping[str, Path]) -> dict[str, Path]:
    """Bundle path to local file: files under their own name, folders below their key.

    Raises ValueError when two files would get the same path, or a path does not exist.
    """
    bundle: dict[str, Path] = {}
    for key, path in files.items():
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            entries = [(f"{key}/{file.relative_to(path).as_posix()}", file) for file in inside]
        elif path.is_file():
            entries = [(path.name, path)]
        else:
            raise ValueError(f"{key}: {path} is neither a file nor a folder")
        for name, file in entries:
            if name in bundle or name == CARD_FILE:
                raise ValueError(f"{key}: the bundle has a file {name!r} already")
            bundle[name] = file
    return bundle


def format_of(path: str) -> str | None:
    """The adapter format of a bundle path: kohya files lie on top, diffusers' in their folder."""
    if not path.endswith(".safetensors"):
        return None
    return path.split("/")[0] if "/" in path else "kohya"


def describe_file(path: str, file: Path) -> AdapterFile:
    """The bundle path with the file's hash and size."""
    return AdapterFile(path, file_sha256(file), file.stat().st_size)


def file_sha256(file: Path) -> str:
    """The sha256 of a file's bytes, 64 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def card_json(name: str, run_id: str, card: AdapterCard, files: Iterable[AdapterFile]) -> str:
    """`adapter.json`: the same facts as the version's tags, for tools that only have the files."""
    scores = {
        measure: {"value": interval.value, "low": interval.low, "high": interval.high}
        for measure, interval in card.scores.items()
    }
    listed = [{"path": f.path, "sha256": f.sha256, "size": f.size_bytes} for f in files]
    data = {"schema": CARD_SCHEMA, "name": name, "run_id": run_id}
    facts = {key: value for key, value in card.tags().items() if key not in card.scores}
    return json.dumps(data | facts | {"scores": scores, "files": listed}, indent=2) + "\n"


def files_tag(files: Iterable[AdapterFile]) -> str:
    """The files of a version as the text of one tag."""
    return json.dumps({file.path: [file.sha256, file.size_bytes] for file in files})


def files_from_tag(where: str, tag: str) -> tuple[AdapterFile, ...]:
    """The files that `files_tag` described.

    Raises ValueError naming `where` for a path that would leave the folder it is put into: the
    registry is shared, and what it says is not to be trusted with a machine's files.
    """
    found = []
    for path, (sha256, size_bytes) in json.loads(tag).items():
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\\" in path:
            raise ValueError(f"{where}: refused the file path {path!r}")
        found.append(AdapterFile(path, str(sha256), int(size_bytes)))
    return tuple(found)

"""Dataset versions: images, captions and split, frozen in a folder that never changes.

The name ends in a hash of what the version is: images, caption bytes, split, rules, model ids.
Any other trainer can read the folder as it is: a one-line .txt beside each picture, a Hugging
Face metadata.jsonl, a kohya dataset.toml.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from captioning.captions import captioned, keep_captions, load_captions
from captioning.character import Character, load_character, plain
from captioning.decisions import (
    dropped_images,
    kept_images,
    load_overrides,
    require_passable,
)
from captioning.errors import UserError
from captioning.framing import Framing, framing_of
from captioning.holdout import MAX_HOLDOUT_SHARE, draw_holdout
from captioning.intake import Image, load_skipped, read_image
from captioning.kohya_toml import dataset_toml
from captioning.lexicon import lexicon
from captioning.lint import lint
from captioning.manifest import MANIFEST, MANIFEST_FORMAT, identity, read_manifest, seal_of, spoiled
from captioning.observations import Kind, Observation, load_observations
from captioning.rows import to_lines
from captioning.store import Store, content_hash, sync_directory
from captioning.version_names import choose_version, is_version_name, split_reference

_SUFFIX = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}


@dataclass(frozen=True)
class Sample:
    """One picture with its caption; width and height are those of the upright picture, in px."""

    sha256: str
    path: Path
    caption: str
    width: int
    height: int
    source: str = ""  # the name it came under
    framing: Framing | None = None  # None when its tags do not tell


@dataclass(frozen=True)
class ModelUsed:
    """A model on whose observations the captions are based."""

    kind: Kind
    model: str
    revision: str


@dataclass(frozen=True)
class DatasetVersion:
    """An immutable set of samples; `manifest_sha256` stands for all of its content."""

    name: str
    path: Path
    character: str
    trigger: str
    class_word: str
    train: tuple[Sample, ...]
    holdout: tuple[Sample, ...]
    manifest_sha256: str
    parent: str | None = None  # the version that was the newest when this one was frozen
    rules: Mapping[str, Any] = field(default_factory=dict, hash=False)
    models: tuple[ModelUsed, ...] = ()


def freeze(
    store: Store,
    character: Character,
    holdout_share: float = 0.2,
    seed: int = 0,
    findings: Mapping[str, int] | None = None,
) -> DatasetVersion:
    """Make a dataset version of the character's captioned images, or find the equal one.

    The holdout (a share of 0 to 0.5) covers the framings and is drawn by `seed`, see `holdout`.
    Captions are rendered and linted here, so that what is frozen is what the rules say now; the
    counts of findings are kept in the manifest, with those of other checks given as `findings`.
    Raises UserError when pictures have no caption yet, there are none, or lint blocks.
    """
    if not 0 <= holdout_share <= MAX_HOLDOUT_SHARE:
        raise UserError("holdout", f"{holdout_share}", f"give a share of 0 to {MAX_HOLDOUT_SHARE}")
    images = kept_images(store, character.name)
    kept = load_captions(store, character.name)
    bare = [image.source for image in images if image.sha256 not in kept]
    if not images or bare:
        raise UserError(
            f"character {character.name}",
            f"{len(bare)} of {len(images)} pictures have no caption",
            f"run `lorafarm dataset caption {character.name}`",
        )
    captions, linted = _passable_captions(store, character)
    models, framings = _observed(store, images)
    content = {
        "format": MANIFEST_FORMAT,
        "character": character.name,
        "trigger": character.trigger,
        "class_word": character.class_word,
        "rules": character.rules.model_dump(mode="json"),
        "models": [asdict(model) for model in models],
        "images": _rows(images, captions, framings, draw_holdout(framings, holdout_share, seed)),
    }
    digest = identity(content)
    versions = store.datasets / character.name
    known = list_version_names(store, character.name)
    for name in known:
        if name.endswith(digest):
            return load_dataset(versions / name)
    number = 1 + max((int(name[1:5]) for name in known), default=0)
    target = versions / f"v{number:04d}-{digest}"
    content |= {
        "parent": known[-1] if known else None,
        "split": {"holdout_share": holdout_share, "seed": seed},
        "findings": dict(sorted((linted | dict(findings or {})).items())),
        "overrides": [one.model_dump() for one in load_overrides(store, character.name)],
    }
    versions.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=versions, prefix=".new-") as temporary:
        building = Path(temporary) / target.name
        _write(store, building, content, images, _rejected(store, character.name))
        building.replace(target)
    sync_directory(versions)
    return load_dataset(target)


def load_dataset(path: Path) -> DatasetVersion:
    """Read a dataset version and verify every file's hash.

    Raises UserError naming the file that is missing or was changed.
    """
    try:
        raw = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise UserError(
            str(path), f"no dataset version: {MANIFEST} is missing", "freeze one, or check the path"
        ) from error
    manifest = read_manifest(raw, path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file() or content_hash(file) != expected:
            state = "was changed" if file.is_file() else "is missing"
            raise spoiled(file, f"it {state} since the version was frozen", path)
    samples: dict[str, list[Sample]] = {"train": [], "holdout": []}
    for row in manifest["images"]:
        samples[row["split"]].append(
            Sample(
                row["sha256"],
                path / row["file"],
                row["caption"],
                row["width"],
                row["height"],
                row["source"],
                row["framing"],
            )
        )
    return DatasetVersion(
        path.name,
        path,
        manifest["character"],
        manifest["trigger"],
        manifest["class_word"],
        tuple(samples["train"]),
        tuple(samples["holdout"]),
        hashlib.sha256(raw).hexdigest(),
        manifest["parent"],
        manifest["rules"],
        tuple(ModelUsed(**model) for model in manifest["models"]),
    )


def list_dataset_versions(store: Store, name: str) -> list[DatasetVersion]:
    """All versions of a character, oldest first."""
    return [load_dataset(store.datasets / name / one) for one in list_version_names(store, name)]


def latest_dataset(store: Store, name: str) -> DatasetVersion:
    """The character's newest version; raises UserError when none was frozen."""
    return find_dataset(store, name)


def find_dataset(store: Store, reference: str) -> DatasetVersion:
    """The version that people name `aya@v2`, `aya@v0002`, `aya@v0002-1a2b3c4d`, or `aya`: newest.

    Raises UserError naming the known ones when there is none, or more than one, of that name.
    """
    name, wanted = split_reference(reference)
    known = list_version_names(store, name)
    if not known:
        load_character(store, name)  # raises if there is none of that name
        raise UserError(
            f"character {name}", "no dataset version yet", f"run `lorafarm dataset freeze {name}`"
        )
    return load_dataset(store.datasets / name / choose_version(name, wanted, known))


def list_version_names(store: Store, name: str) -> list[str]:
    """The names of a character's versions, oldest first, without reading them."""
    versions = store.datasets / plain(name)
    if not versions.is_dir():
        return []
    return sorted(folder.name for folder in versions.iterdir() if is_version_name(folder.name))


def _passable_captions(store: Store, character: Character) -> tuple[dict[str, str], dict[str, int]]:
    """(captions as the rules and edits give them now, counts by code of what lint says).

    They are kept as the character's captions. Raises UserError when lint blocks and nobody has
    overridden it.
    """
    captions = captioned(store, character)
    findings = lint(captions, character)
    require_passable(store, character.name, findings, load_overrides(store, character.name))
    keep_captions(store, character, {one.image: one.caption for one in captions})
    texts = {one.image: one.caption.text for one in captions}
    return texts, dict(Counter(found.code for found in findings))


def _observed(
    store: Store, images: list[Image]
) -> tuple[list[ModelUsed], dict[str, Framing | None]]:
    """The models whose newest tags and prose the captions are made of; each image's framing."""
    models: set[tuple[Kind, str, str]] = set()
    framings: dict[str, Framing | None] = {}
    for image in images:
        newest: dict[Kind, Observation] = {}
        for seen in load_observations(store, image.sha256):
            if seen.tags is not None or seen.prose is not None:
                newest[seen.kind] = seen
        models |= {(kind, seen.model, seen.revision) for kind, seen in newest.items()}
        tagged = newest.get("tags")
        framings[image.sha256] = (
            framing_of(tagged.tags or {}, lexicon().threshold(tagged.model)) if tagged else None
        )
    return [ModelUsed(*model) for model in sorted(models)], framings


def _rows(
    images: list[Image],
    captions: dict[str, str],
    framings: Mapping[str, Framing | None],
    held: frozenset[str],
) -> list[dict[str, Any]]:
    """One row for each image: where it lies in the version, in which split, with its caption."""
    numbers = {"train": 0, "holdout": 0}
    rows = []
    for image in images:
        split = "holdout" if image.sha256 in held else "train"
        numbers[split] += 1
        place = "images" if split == "train" else "holdout"
        suffix = _SUFFIX.get(image.format, f".{image.format.lower()}")
        rows.append(
            asdict(image)
            | {
                "caption": captions[image.sha256],
                "split": split,
                "framing": framings[image.sha256],
                "file": f"{place}/{numbers[split]:04d}{suffix}",
            }
        )
    return rows


def _rejected(store: Store, name: str) -> list[dict[str, Any]]:
    """Every file that is not in the version, with the reason: not readable, or dropped."""
    unread = [asdict(item) for item in load_skipped(store, name)]
    dropped = [
        {"sha256": image.sha256, "source": image.source}
        | decision.model_dump(include={"code", "reason", "by"})
        for image, decision in dropped_images(store, name)
    ]
    return unread + dropped


def _write(
    store: Store,
    target: Path,
    content: dict[str, Any],
    images: list[Image],
    rejected: list[dict[str, Any]],
) -> None:
    """All files of a version: training pictures in images/, held-out ones in holdout/."""
    for name in ("images", "holdout"):
        (target / name).mkdir(parents=True)
    metadata: dict[str, list[dict[str, str]]] = {"train": [], "holdout": []}
    for image, row in zip(images, content["images"], strict=True):
        file = target / row["file"]
        file.write_bytes(read_image(store, image))
        file.with_suffix(".txt").write_text(row["caption"], "utf-8")
        metadata[row["split"]].append({"file_name": row["file"], "text": row["caption"]})
    (target / "metadata.jsonl").write_text(to_lines(metadata["train"]), "utf-8")
    (target / "holdout.jsonl").write_text(to_lines(metadata["holdout"]), "utf-8")
    (target / "rejected.jsonl").write_text(to_lines(rejected), "utf-8")
    sides = (min(image.width, image.height) for image in images)
    # Relative, for the folder may be anywhere: sd-scripts has to be started inside it.
    kohya = dataset_toml("images", content["class_word"], sides)
    (target / "dataset.toml").write_text(kohya, "utf-8")
    files = sorted(file for file in target.rglob("*") if file.is_file())
    hashes = {file.relative_to(target).as_posix(): content_hash(file) for file in files}
    manifest = content | {"files": hashes}
    sealed = manifest | {"seal": seal_of(manifest)}
    text = json.dumps(sealed, indent=1, ensure_ascii=False) + "\n"
    (target / MANIFEST).write_text(text, "utf-8")
    for file in [*files, target / MANIFEST]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    for directory in (target / "images", target / "holdout", target):
        sync_directory(directory)

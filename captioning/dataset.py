"""Dataset versions: images, captions and split, frozen in a folder that never changes.

Any other trainer can read the folder as it is: a one-line .txt beside each picture, a Hugging
Face metadata.jsonl, a kohya dataset.toml.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from captioning.captions import load_captions
from captioning.character import Character, plain
from captioning.decisions import dropped_images, kept_images
from captioning.errors import UserError
from captioning.intake import Image, load_skipped, read_image
from captioning.rows import to_lines
from captioning.store import Store, content_hash, sync_directory

MANIFEST = "manifest.json"
# With fewer pictures nothing can be spared for a holdout.
MIN_PICTURES_FOR_HOLDOUT = 5
MAX_HOLDOUT_SHARE = 0.5
_NAME = re.compile(r"v(\d{4})-([0-9a-f]{8})")
_SUFFIX = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}


@dataclass(frozen=True)
class Sample:
    """One picture with its caption; width and height are those of the upright picture, in px."""

    sha256: str
    path: Path
    caption: str
    width: int
    height: int


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


def freeze(
    store: Store, character: Character, holdout_share: float = 0.2, seed: int = 0
) -> DatasetVersion:
    """Make a dataset version of the character's captioned images, or find the equal one.

    The holdout (a share of 0 to 0.5) is drawn by `seed`; it is empty with fewer than 5 pictures.
    Raises UserError when pictures have no caption yet, or there are none.
    """
    if not 0 <= holdout_share <= MAX_HOLDOUT_SHARE:
        raise UserError("holdout", f"{holdout_share}", f"give a share of 0 to {MAX_HOLDOUT_SHARE}")
    images = kept_images(store, character.name)
    captions = load_captions(store, character.name)
    bare = [image.source for image in images if image.sha256 not in captions]
    if not images or bare:
        raise UserError(
            f"character {character.name}",
            f"{len(bare)} of {len(images)} pictures have no caption",
            f"run `lorafarm dataset caption {character.name}`",
        )
    content = {
        "character": character.name,
        "trigger": character.trigger,
        "class_word": character.class_word,
        "images": _rows(images, captions, _draw_holdout(images, holdout_share, seed)),
    }
    digest = _digest(content)
    versions = store.datasets / character.name
    known = _known(versions)
    for name in known:
        if name.endswith(digest):
            return load_dataset(versions / name)
    number = 1 + max((int(name[1:5]) for name in known), default=0)
    target = versions / f"v{number:04d}-{digest}"
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
    manifest = _verified(path, raw)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file() or content_hash(file) != expected:
            state = "was changed" if file.is_file() else "is missing"
            raise _spoiled(file, f"it {state} since the version was frozen", path)
    samples: dict[str, list[Sample]] = {"train": [], "holdout": []}
    for row in manifest["images"]:
        place = path / row["file"]
        sample = Sample(row["sha256"], place, row["caption"], row["width"], row["height"])
        samples[row["split"]].append(sample)
    return DatasetVersion(
        path.name,
        path,
        manifest["character"],
        manifest["trigger"],
        manifest["class_word"],
        tuple(samples["train"]),
        tuple(samples["holdout"]),
        hashlib.sha256(raw).hexdigest(),
    )


def list_dataset_versions(store: Store, name: str) -> list[DatasetVersion]:
    """All versions of a character, oldest first."""
    versions = store.datasets / plain(name)
    return [load_dataset(versions / version) for version in _known(versions)]


def latest_dataset(store: Store, name: str) -> DatasetVersion:
    """The character's newest version; raises UserError when none was frozen."""
    known = _known(store.datasets / plain(name))
    if not known:
        raise UserError(
            f"character {name}", "no dataset version yet", f"run `lorafarm dataset freeze {name}`"
        )
    return load_dataset(store.datasets / name / known[-1])


def _known(versions: Path) -> list[str]:
    if not versions.is_dir():
        return []
    return sorted(folder.name for folder in versions.iterdir() if _NAME.fullmatch(folder.name))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _verified(path: Path, raw: bytes) -> dict[str, Any]:
    """The manifest, when its content is the one that the version's name was made of."""
    try:
        manifest: dict[str, Any] = json.loads(raw)
        content = {key: value for key, value in manifest.items() if key != "files"}
        same = path.name.endswith(f"-{_digest(content)}") and isinstance(manifest["files"], dict)
    except (ValueError, KeyError, AttributeError) as error:
        raise _spoiled(path / MANIFEST, "it is not readable", path) from error
    if not same:
        raise _spoiled(path / MANIFEST, "it does not belong to the version of this name", path)
    return manifest


def _spoiled(file: Path, found: str, version: Path) -> UserError:
    fix = f"delete {version} and run `lorafarm dataset freeze` again, or put the original back"
    return UserError(str(file), found, fix)


def _draw_holdout(images: list[Image], share: float, seed: int) -> set[str]:
    """The sha256s held out: those with the lowest hashes, so that adding pictures moves few."""
    if len(images) < MIN_PICTURES_FOR_HOLDOUT or share == 0:
        return set()
    count = max(1, round(share * len(images)))
    names = [image.sha256 for image in images]
    return set(
        sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())[:count]
    )


def _rows(images: list[Image], captions: dict[str, str], held: set[str]) -> list[dict[str, Any]]:
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
    side = min(min(image.width, image.height) for image in images)
    (target / "dataset.toml").write_text(_kohya_toml(content["class_word"], side), "utf-8")
    files = sorted(file for file in target.rglob("*") if file.is_file())
    hashes = {file.relative_to(target).as_posix(): content_hash(file) for file in files}
    manifest = json.dumps(content | {"files": hashes}, indent=1, ensure_ascii=False)
    (target / MANIFEST).write_text(manifest + "\n", "utf-8")
    for file in [*files, target / MANIFEST]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    for directory in (target / "images", target / "holdout", target):
        sync_directory(directory)


def _kohya_toml(class_word: str, side_px: int) -> str:
    """sd-scripts' dataset config; `image_dir` is relative, so start it inside this folder."""
    words = json.dumps(class_word)  # a TOML basic string
    # Buckets are multiples of 64 px; more than 1024 px no base of today is trained at.
    resolution = max(64, min(1024, side_px // 64 * 64))
    return (
        "[general]\ncaption_extension = '.txt'\nkeep_tokens = 1\nshuffle_caption = true\n\n"
        f"[[datasets]]\nresolution = {resolution}\nenable_bucket = true\n\n"
        f"  [[datasets.subsets]]\n  image_dir = 'images'\n  class_tokens = {words}\n"
        "  num_repeats = 1\n"
    )

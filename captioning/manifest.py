"""A dataset version's manifest: what the version is, and how a change to it is noticed.

`identity` is the hash in the version's name: images, caption bytes, split, rules, model ids. The
seal covers the rest of the manifest too, and the manifest every other file of the version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from captioning.errors import UserError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 2  # of the manifest's layout; another one is not read


def read_manifest(raw: bytes, version: Path) -> dict[str, Any]:
    """The manifest of the version in the folder `version`, when it is whole and belongs there.

    Raises UserError when it was changed, is not readable, or has another version's content.
    """
    try:
        manifest: dict[str, Any] = json.loads(raw)
        if manifest.get("format") != MANIFEST_FORMAT:
            raise UserError(
                str(version / MANIFEST),
                f"written in format {manifest.get('format', 1)}, not {MANIFEST_FORMAT}",
                "run `lorafarm dataset freeze` again with this release",
            )
        seal = manifest.pop("seal")
        same = version.name.endswith(f"-{identity(manifest)}") and seal == seal_of(manifest)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise spoiled(version / MANIFEST, "it is not readable", version) from error
    if not same:
        raise spoiled(version / MANIFEST, "it does not belong to the version of this name", version)
    return manifest


def identity(content: Mapping[str, Any]) -> str:
    """What a version is, in 8 hex digits; the order of its images is no part of it."""
    what = {key: content[key] for key in ("character", "trigger", "class_word", "rules", "models")}
    what["images"] = sorted(
        [row["sha256"], row["caption"], row["split"]] for row in content["images"]
    )
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


def seal_of(manifest: Mapping[str, Any]) -> str:
    """sha256 of all of the manifest, also of what its name does not stand for."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def spoiled(file: Path, found: str, version: Path) -> UserError:
    fix = f"delete {version} and run `lorafarm dataset freeze` again, or put the original back"
    return UserError(str(file), found, fix)

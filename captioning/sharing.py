"""Dataset versions put into an object store and fetched from it, every hash verified.

Files lie under `blobs/<aa>/<sha256>`, so that what two versions share is stored once; the manifest
`datasets/<character>/<version>/manifest.json` is put last and once: a version that can be listed
is whole. Both directions can be stopped at any moment and go on from what is done.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from captioning.errors import UserError
from captioning.manifest import MANIFEST, read_manifest
from captioning.object_store import ObjectStore
from captioning.store import Store, sync_directory, write_atomic
from captioning.version_names import choose_version, is_version_name, split_reference
from captioning.versions import DatasetVersion, load_dataset

# Requests under way at once: enough to hide a network's delay, few enough for any server.
WORKERS = 8
# The files of a version; a manifest that names any other could write elsewhere.
_FILE = re.compile(r"(images|holdout)/\d{4,6}\.[a-z]{3,4}|[a-z]+\.(jsonl|toml)")

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class Transfer:
    """What moved: `sent` objects, and `present` ones that were there and equal already."""

    version: str
    sent: int
    present: int


def push_version(
    version: DatasetVersion, objects: ObjectStore, progress: ProgressCallback | None = None
) -> Transfer:
    """Put a version into the store; what is there and equal stays, what was put is read back.

    Raises UserError when another version has the same name there, or bytes came out changed.
    """
    raw = (version.path / MANIFEST).read_bytes()
    files = read_manifest(raw, version.path)["files"]
    manifest_key = _manifest_key(version.character, version.name)
    known = objects.get(manifest_key)
    if known is not None and known != raw:
        raise _taken(objects, version.name)
    by_hash = {sha256: version.path / name for name, sha256 in files.items()}

    def put(sha256: str) -> bool:
        key = _blob_key(sha256)
        if objects.sha256(key) == sha256:
            return False
        data = by_hash[sha256].read_bytes()
        objects.put(key, data)
        if hashlib.sha256(objects.get(key) or b"").hexdigest() != sha256:
            raise UserError(
                objects.url, f"{key} came back changed", "push again; check the store's disks"
            )
        return True

    sent = sum(_all(put, list(by_hash), progress))
    if not objects.put_new(manifest_key, raw) and objects.get(manifest_key) != raw:
        raise _taken(objects, version.name)
    return Transfer(version.name, sent, len(by_hash) - sent)


def pull_version(
    reference: str,
    objects: ObjectStore,
    store: Store,
    progress: ProgressCallback | None = None,
) -> tuple[DatasetVersion, Transfer]:
    """Fetch the version `aya@v2` (or the newest, for `aya`) and verify all of it.

    What an earlier pull fetched is kept. Raises UserError when the store has no such version, when
    a file is missing or changed there, or another version of that name is here.
    """
    character, wanted = split_reference(reference)
    name = choose_version(character, wanted, list_remote(objects, character))
    key = _manifest_key(character, name)
    target = store.datasets / character / name
    raw = objects.get(key)
    if raw is None:
        raise UserError(f"{objects.url}/{key}", "it is gone", "list the versions there again")
    files = _checked_files(raw, target, f"{objects.url}/{key}", character)
    if target.exists():
        if (target / MANIFEST).read_bytes() != raw:
            raise _taken(store.datasets, name)
        return load_dataset(target), Transfer(name, 0, len(files))
    staging = target.with_name(f".pull-{name}")

    def fetch(file: str) -> bool:
        sha256, place = files[file], staging / file
        if place.is_file() and hashlib.sha256(place.read_bytes()).hexdigest() == sha256:
            return False
        data = objects.get(_blob_key(sha256))
        if data is None or hashlib.sha256(data).hexdigest() != sha256:
            state = "missing" if data is None else "changed"
            raise UserError(
                f"{objects.url}/{_blob_key(sha256)}",
                f"{file} of {name} is {state} there",
                "push the version again from where it was frozen",
            )
        write_atomic(place, data)
        return True

    fetched = sum(_all(fetch, list(files), progress))
    for folder in ("images", "holdout"):
        (staging / folder).mkdir(exist_ok=True)
    for file in staging.rglob("*"):  # left by a pull that was killed while writing
        if file.is_file() and file.relative_to(staging).as_posix() not in files:
            file.unlink()
    write_atomic(staging / MANIFEST, raw)
    staging.replace(target)
    sync_directory(target.parent)
    return load_dataset(target), Transfer(name, fetched, len(files) - fetched)


def list_remote(objects: ObjectStore, character: str) -> list[str]:
    """The names of the character's versions in the store, oldest first; UserError for none."""
    prefix = f"datasets/{character}/"
    places = (key.removeprefix(prefix).split("/") for key in objects.keys(prefix))
    names = sorted(
        place[0] for place in places if place[1:] == [MANIFEST] and is_version_name(place[0])
    )
    if not names:
        raise UserError(
            objects.url,
            f"no dataset version of {character} there",
            f"push one with `lorafarm dataset push {character} --to {objects.url}`",
        )
    return names


def _checked_files(raw: bytes, target: Path, where: str, character: str) -> dict[str, str]:
    """The files of a manifest from elsewhere, which is trusted in nothing."""
    try:
        manifest = read_manifest(raw, target)
    except UserError as error:
        raise UserError(where, error.found, "push the version again") from error
    files = manifest["files"]
    odd = not isinstance(files, dict) or manifest["character"] != character
    odd = odd or not all(
        _FILE.fullmatch(name) and re.fullmatch(r"[0-9a-f]{64}", str(sha256))
        for name, sha256 in files.items()
    )
    rows = manifest["images"]
    if odd or not all(row["file"] in files for row in rows):
        raise UserError(where, "its list of files is no dataset version's", "do not use it")
    return files


def _all(
    work: Callable[[str], bool], items: Sequence[str], progress: ProgressCallback | None
) -> Iterable[bool]:
    """`work` on all items, several at once; the first error stops what was not begun."""
    with ThreadPoolExecutor(WORKERS) as pool:
        tasks = [pool.submit(work, item) for item in items]
        try:
            for done, task in enumerate(tasks, start=1):
                yield task.result()
                if progress:
                    progress(done, len(items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _blob_key(sha256: str) -> str:
    return f"blobs/{sha256[:2]}/{sha256}"


def _manifest_key(character: str, name: str) -> str:
    return f"datasets/{character}/{name}/{MANIFEST}"


def _taken(where: ObjectStore | Path, name: str) -> UserError:
    place = where if isinstance(where, Path) else where.url
    return UserError(
        str(place),
        f"another {name} is there: the same images and captions with another history",
        "keep that one; training on either gives the same",
    )

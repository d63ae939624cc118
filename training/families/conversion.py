"""A single-file checkpoint as a folder in diffusers layout, made once and kept.

`file` or `file@config` in, a folder in the cache out, by diffusers' own `from_single_file`. Never
changes the file or the config's folder; a folder appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from captioning import UserError, no_progress_bars
from training.families.base import Base
from training.families.files import (
    INDEX_FILE,
    check_files,
    has_weights,
    naming_the_folder,
    read_json,
)
from training.families.original_network import is_part, read_network
from training.families.single_file import PARTS, Contents, Spelling, inspect

log = logging.getLogger(__name__)

# Part of every folder's name: raise it when the same file comes out differently.
FORMAT = 1
SOURCE_FILE = "single_file.json"
CACHE_VARIABLE = "XDG_CACHE_HOME"
# The bytes that are needed beside the weights, for configs, tokenizers and headers.
_SPARE_BYTES = 64 << 20
_HASH_CHUNK_BYTES = 1 << 20
_CONFIG_KINDS = {".json", ".txt", ".model", ".jinja"}


def converted(base: Spelling, families: Mapping[str, type[Base]]) -> Path:
    """The folder in diffusers layout with the content of a single-file checkpoint.

    It lies in `$XDG_CACHE_HOME/lorafarm/bases` (`~/.cache` without that) under the sha256 of the
    file and its configs, so that it is made once; a log line says so. Configs, tokenizers and what
    else the file lacks are those of `base.config`; without one, the configs are those that
    diffusers takes from the hub. Raises UserError as `inspect` does, when a config or a part cannot
    be had, and when the disk has no room.
    """
    given = None if base.config is None else _config_folder(base, base.config)
    rest = None if given is None else read_json(given / INDEX_FILE).get("_class_name")
    contents = inspect(base.file, rest)
    kind = next(kind for kind in families.values() if contents.pipeline in kind.pipelines)
    config = given or _config_folder(base, contents.default_config)
    _check_config(base, config, kind, contents)
    target = _cache() / _key(base.file, config, kind, contents)
    if (target / INDEX_FILE).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(target):
        if not (target / INDEX_FILE).is_file():  # another process may have been faster
            _check_room(base, contents, target.parent)
            log.warning(
                "%s: converting once to %s (%.1f GB; delete that folder at any time)",
                base.file,
                target,
                contents.size_bytes / 1e9,
            )
            _convert(base, config, kind, contents, target)
    return target


def _cache() -> Path:
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root) if root else Path.home() / ".cache") / "lorafarm" / "bases"


# Finding the configs.


def _config_folder(base: Spelling, config: str) -> Path:
    """The local folder of the configs; those of a hub id are looked for in the cache first."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if (folder := Path(config).expanduser()).is_dir():
        if not (folder / INDEX_FILE).is_file():
            raise UserError(
                str(folder / INDEX_FILE),
                f"is missing, so {base.file.name} cannot be completed from this folder",
                "name a folder in diffusers layout after the @",
            )
        return folder
    allow = [f"{place}*{suffix}" for place in ("", "*/") for suffix in sorted(_CONFIG_KINDS)]
    try:
        cached = Path(snapshot_download(config, allow_patterns=allow, local_files_only=True))
        # A cache may hold another part of the repository.
        names = read_json(cached / INDEX_FILE)
        parts = [part for part, value in names.items() if is_part(value)]
        if all((cached / part).is_dir() for part in parts if part not in _UNUSED):
            return cached
    except (LocalEntryNotFoundError, UserError, HFValidationError):
        pass  # it is downloaded below, or the error there says why not
    try:
        return Path(snapshot_download(config, allow_patterns=allow))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            str(base.file),
            f"holds no configs and tokenizers; those of {config} could not be had ({reason})",
            f"write {base.file}@FOLDER with a folder in diffusers layout of the same family, or "
            "run it once where the hub can be reached",
        ) from error


_UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}


def _check_config(base: Spelling, config: Path, kind: type[Base], contents: Contents) -> None:
    """UserError unless the configs are of the family and hold what the file lacks."""
    said = read_json(config / INDEX_FILE).get("_class_name")
    other = said in PARTS and said != contents.pipeline  # dev and klein are of one family
    if said not in kind.pipelines or other:
        raise UserError(
            f"{base.file}@{config}",
            f"the file is of {contents.pipeline}, but the folder of {said}",
            "name a folder of the same family after the @",
        )
    lacking = [name for name in _parts(config, kind, contents) if name not in contents.dtypes]
    weighty = [name for name in lacking if not _is_config_only(name)]
    try:
        check_files(config, tuple(lacking))
        for name in contents.dtypes:
            read_json(config / name / "config.json")
    except UserError as error:
        if not weighty:
            raise
        raise UserError(
            str(base.file),
            f"holds no {' and no '.join(weighty)}, and {config} has none either "
            f"({error.where} {error.found})",
            f"write {base.file}@FOLDER with a whole model of the family in diffusers layout",
        ) from error


def _parts(config: Path, kind: type[Base], contents: Contents) -> list[str]:
    """The components of the model, without optional ones whose weights are nowhere."""

    def is_there(name: str) -> bool:
        network = name.replace("tokenizer", "text_encoder")
        return network in contents.dtypes or has_weights(config, network)

    return [name for name in kind.components if name not in kind.optional or is_there(name)]


def _is_config_only(component: str) -> bool:
    return component == "scheduler" or component.startswith("tokenizer")


# Naming the folder.


def _key(file: Path, config: Path, kind: type[Base], contents: Contents) -> str:
    """sha256 hex of all that decides what the folder holds."""
    parts = _parts(config, kind, contents)
    borrowed = [name for name in parts if not _is_config_only(name) and name not in contents.dtypes]
    configs = {
        path.relative_to(config).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in parts
        for path in sorted((config / name).iterdir())
        if path.suffix in _CONFIG_KINDS and path.is_file()
    }
    stat = file.stat()
    content = {
        "format": FORMAT,
        "file": _sha256(file.resolve(), stat.st_size, stat.st_mtime_ns),
        "configs": configs,
        "borrowed": {name: str((config / name).resolve()) for name in borrowed},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=8)
def _sha256(file: Path, size: int, changed_ns: int) -> str:
    """The sha256 of the file's bytes; a changed `size` or `changed_ns` means another file."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """Let one process convert while others wait; leftovers of a crash are removed."""
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(_temporary(target), ignore_errors=True)
        yield


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.converting")


def _check_room(base: Spelling, contents: Contents, folder: Path) -> None:
    needed, free = contents.size_bytes + _SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            str(folder),
            f"has {free / 1e9:.1f} GB free; {base.file.name} in diffusers layout takes "
            f"{needed / 1e9:.1f} GB",
            f"free some space, or set {CACHE_VARIABLE} to another disk",
        )


# Converting.


def _convert(
    base: Spelling, config: Path, kind: type[Base], contents: Contents, target: Path
) -> None:
    folder = _temporary(target)
    folder.mkdir()
    try:
        for name in _parts(config, kind, contents):
            if name in contents.dtypes:
                # Parts are converted one at a time, each in its own precision, to save memory.
                _convert_part(base, config, name, contents, folder / name)
            elif _is_config_only(name):
                shutil.copytree(config / name, folder / name, copy_function=shutil.copyfile)
            else:
                (folder / name).symlink_to((config / name).resolve(), target_is_directory=True)
        _set_prediction(folder / "scheduler" / "scheduler_config.json", contents)
        source = {"file": base.file.name, "config": str(base.config or contents.default_config)}
        (folder / SOURCE_FILE).write_text(json.dumps(source, indent=1))
        index = read_json(config / INDEX_FILE)
        absent = {
            name: [None, None]
            for name, value in index.items()
            if is_part(value) and not (folder / name).is_dir()
        }
        # It is written last: a folder without it counts as not there.
        (folder / INDEX_FILE).write_text(json.dumps({**index, **absent}, indent=1))
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _convert_part(
    base: Spelling, config: Path, name: str, contents: Contents, folder: Path
) -> None:
    """One network of the checkpoint, saved with the family's config."""
    with naming_the_folder(base.file), no_progress_bars(), _quiet_diffusers():
        network = read_network(base.file, config, name, contents)
        if hasattr(network, "tie_weights"):
            network.tie_weights()  # a T5's embedding is one in the file, and two in the model
        lacking = [key for key, tensor in network.state_dict().items() if tensor.is_meta]
        if lacking:
            raise ValueError(f"its {name} lacks {lacking[0]} and {len(lacking) - 1} more")
        network.save_pretrained(folder, safe_serialization=True)
    # The published config replaces the saved one, which names the folder that it came from.
    for path in folder.glob("*.json"):
        if not path.name.endswith(".safetensors.index.json"):
            path.unlink()
    shutil.copyfile(config / name / "config.json", folder / "config.json")


def _set_prediction(file: Path, contents: Contents) -> None:
    """Write the file's own prediction type over that of the config, which is the family's first.

    A model with zero terminal SNR is sampled from its last step (Lin et al. 2024, section 3.3).
    """
    changes: dict[str, Any] = {}
    if contents.prediction_type is not None:
        changes["prediction_type"] = contents.prediction_type
    if contents.zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if changes:
        file.write_text(json.dumps({**read_json(file), **changes}, indent=1))


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Silence diffusers: its bars and advice would disturb the display in the terminal."""
    from diffusers.utils import logging as diffusers_logging

    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)
        diffusers_logging.enable_progress_bar()

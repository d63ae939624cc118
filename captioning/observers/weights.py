"""Loading a model of transformers from a folder or a hub id, and what it is called afterwards.

Every way in which that fails for a person's reasons becomes a UserError.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from captioning.errors import UserError
from captioning.store import content_hash

HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
REVISION_DIGITS = 12


def require_model(source: str) -> None:
    """Raise UserError when `source` is neither a folder with a config.json nor like a hub id."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            source, "no model: config.json is missing", "give the folder that has config.json in it"
        )
    if not folder.is_dir() and (folder.exists() or not HUB_ID.fullmatch(source)):
        raise UserError(source, "there is no such folder", "check the path, or give a hub id")


@contextmanager
def loading(source: str, wanted: str, loader: str) -> Iterator[None]:
    """Have transformers load `source` inside the block; its errors become UserError."""
    from safetensors import SafetensorError

    require_model(source)
    try:
        with no_progress_bars():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            source,
            f"no {wanted} ({first_line})",
            f"give a folder or hub id that transformers' {loader} loads",
        ) from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Loading takes a second or two; transformers' bars would tear the person's display."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def require_all_weights(info: dict[str, Any]) -> None:
    """Raise ValueError when transformers had to make up weights that the files do not have.

    `info` is what `from_pretrained(..., output_loading_info=True)` returns beside the model.
    """
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise ValueError(f"its files lack {len(lacking)} weights, such as {lacking[0]}")


def model_name(source: str) -> str:
    """A folder's name, or a hub id with its slash made fit for a file name."""
    folder = Path(source)
    return folder.resolve().name if folder.is_dir() else source.replace("/", "--")


def identify_model(source: str) -> tuple[str, str]:
    """(id, revision) as the loaded model will bear them, from its files and config alone.

    Raises UserError when there is no such model.
    """
    require_model(source)
    if Path(source).is_dir():
        return model_name(source), revision_of(source, None)
    from transformers import AutoConfig

    with loading(source, "model", "AutoConfig"):
        return model_name(source), revision_of(source, AutoConfig.from_pretrained(source))


def revision_of(source: str, config: Any) -> str:
    """12 digits: of a folder's content hash, or of the hub commit that transformers loaded."""
    if Path(source).is_dir():
        return content_hash(Path(source))[:REVISION_DIGITS]
    return str(getattr(config, "_commit_hash", None) or "unknown")[:REVISION_DIGITS]

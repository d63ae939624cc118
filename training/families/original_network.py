"""One network of a single-file checkpoint, read by diffusers' own converters.

A file and a folder of configs in, the network on the CPU out. Never writes anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from training.families.files import INDEX_FILE, read_json
from training.families.single_file import DENOISER_PREFIX, Contents


def read_network(file: Path, config: Path, name: str, contents: Contents) -> Any:
    """The part `name` of a checkpoint, built by the configs in the folder `config`, on the CPU.

    Raises what diffusers does on broken files, and ValueError for weights that are missing.
    """
    import diffusers

    pipeline = getattr(diffusers, contents.pipeline)
    index = read_json(config / INDEX_FILE)
    if not hasattr(pipeline, "from_single_file"):
        return _lone_network(file, config, name, index[name][1], contents)
    others = {other: None for other, value in index.items() if is_part(value) and other != name}
    with _naming_what_is_missing(name):
        loaded = pipeline.from_single_file(
            str(file),
            config=str(config),
            local_files_only=True,
            torch_dtype=contents.dtypes[name],
            **others,
        )
    return getattr(loaded, name)


def _lone_network(file: Path, config: Path, name: str, kind: str, contents: Contents) -> Any:
    """A network whose class diffusers reads from a file, while it has no such pipeline.

    Those classes know the original repository's names, without the prefix that ComfyUI adds.
    """
    import diffusers

    with safe_open(file, framework="pt") as opened:
        names = opened.keys()
        prefix = DENOISER_PREFIX if any(n.startswith(DENOISER_PREFIX) for n in names) else ""
        tensors = {
            key.removeprefix(prefix): opened.get_tensor(key)
            for key in names
            if key.startswith(prefix)
        }
    with _naming_what_is_missing(name):
        return getattr(diffusers, kind).from_single_file(
            tensors,
            config=str(config),
            subfolder=name,
            local_files_only=True,
            torch_dtype=contents.dtypes[name],
        )


@contextmanager
def _naming_what_is_missing(name: str) -> Iterator[None]:
    """Turn the errors about tensors that the file lacks into ones that say so."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(f"its {name} lacks some of its weights") from error
    except KeyError as error:
        raise ValueError(f"its {name} lacks some of its weights: {error.args[0]}") from error


def is_part(value: Any) -> bool:
    """Whether an entry of a model's index is a component that is there."""
    return isinstance(value, list) and bool(value) and value[0] is not None

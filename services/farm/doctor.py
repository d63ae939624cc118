"""What this machine has for the farm, what is missing, and the command that fixes it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import psutil

from captioning import STARTER_CAPTIONER, STARTER_CLIP, STARTER_TAGGER, UserError
from services.farm.settings import Home

# The demo peaks below 8 GiB; under 6 GiB free it would swap.
MIN_FREE_MEMORY_GIB = 6
# The demo writes about 0.3 GiB; a real sweep of SD1.5 adapters some GiB.
MIN_FREE_DISK_GIB = 2
GIB = 1024**3


@dataclass(frozen=True)
class Check:
    """One thing that was looked for on this machine."""

    name: str
    ok: bool
    found: str  # in words: a version, a path, or what is wrong
    fix: str = ""  # the command or advice that mends it
    needed: bool = True  # False when the farm runs without it


def check_machine(home: Home) -> tuple[Check, ...]:
    """Look for everything that the farm at `home` uses; nothing is created."""
    return tuple(_checks(home))


def missing_parts(checks: Iterable[Check]) -> tuple[Check, ...]:
    """The failed checks of parts that the farm needs."""
    return tuple(check for check in checks if check.needed and not check.ok)


def _checks(home: Home) -> Iterator[Check]:
    version = sys.version_info
    yield Check(
        "Python",
        version >= (3, 11),
        f"{version.major}.{version.minor}.{version.micro}",
        "make PYTHON=/path/to/python3.11 demo",
    )
    for package in ("torch", "diffusers", "transformers", "peft", "ray", "mlflow", "onnxruntime"):
        yield _package(package)
    yield from _machine(home)
    yield from _starters()
    yield from _optional()


def _package(name: str) -> Check:
    try:
        return Check(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, False, "not installed", "make .venv/installed")


def _machine(home: Home) -> Iterator[Check]:
    free = psutil.virtual_memory().available / GIB
    yield Check(
        "memory",
        free >= MIN_FREE_MEMORY_GIB,
        f"{free:.1f} GiB free, {os.cpu_count()} cores",
        f"close something: the demo wants {MIN_FREE_MEMORY_GIB} GiB free",
    )
    folder = _existing_parent(home.path)
    disk = shutil.disk_usage(folder).free / GIB
    yield Check(
        "disk",
        disk >= MIN_FREE_DISK_GIB,
        f"{disk:.1f} GiB free under {folder}",
        "free some space, or set LORAFARM_HOME to another disk",
    )
    yield Check(
        "home is writable",
        os.access(folder, os.W_OK),
        str(home.path),
        f"chown or choose another one: export LORAFARM_HOME=... (now {home.path})",
    )
    yield _gpu()


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("GPU", False, "none: training runs on the CPU", "docs/gpus.md", needed=False)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("GPU", True, ", ".join(names), needed=False)


def _starters() -> Iterator[Check]:
    from training import STARTER_BASE, base_hash

    folders: list[tuple[str, Path, Callable[[Path], object]]] = [
        ("starter tagger", STARTER_TAGGER / "model.onnx", Path.stat),
        ("starter captioner", STARTER_CAPTIONER / "model.safetensors", Path.stat),
        ("starter CLIP", STARTER_CLIP / "model.safetensors", Path.stat),
        ("starter base", STARTER_BASE, base_hash),
    ]
    for name, path, probe in folders:
        try:
            probe(path)
        except (OSError, UserError) as error:
            yield Check(
                name, False, str(error), "git checkout -- captioning/starter training/starter"
            )
        else:
            yield Check(name, True, str(path))


def _optional() -> Iterator[Check]:
    extras = [
        ("import-linter and pytest (tests)", "pytest", "make test"),
        (
            "psycopg (MLflow in Postgres)",
            "psycopg",
            "pip install -c constraints.txt -e '.[postgres]'",
        ),
        (
            "playwright (tests of the pages)",
            "playwright",
            "pip install -c constraints.txt -e '.[browser]'",
        ),
        (
            "onnx (rebuilding the starters)",
            "onnx",
            "pip install -c constraints.txt -e '.[starters]'",
        ),
    ]
    for name, module, fix in extras:
        there = find_spec(module) is not None
        yield Check(name, there, "there" if there else "not installed", fix, needed=False)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    yield Check(
        "Chromium (tests of the pages)",
        chromium is not None,
        chromium or "not installed",
        "apt install chromium, or install Google Chrome",
        needed=False,
    )
    node = shutil.which("node")
    yield Check(
        "node (rebuilding the starters' pictures)",
        node is not None,
        node or "not installed",
        "install Node.js 20 or newer",
        needed=False,
    )


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path

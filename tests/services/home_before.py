"""A home that an earlier version of the farm made, in a copy that a test may work in.

`data/home-before/` is a demo's home after its sweep of `aya`. To keep it small, one checkpoint has
its weights; of the others the safetensors headers were kept, and the copy has zeros below them.
Only pictures of the first seed were kept, and no artifacts of MLflow. `expected-leaderboard.json`
is what the version of then said of the sweep.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path

FIXTURE = Path(__file__).parent / "data" / "home-before"
HEAD = ".head.gz"
# The checkpoint that has its weights.
WHOLE = ("t37819dc2d158", 80)
EXPECTED = json.loads((FIXTURE / "expected-leaderboard.json").read_text())


def copy_home(to: Path) -> Path:
    """Copy the home to `to`, with files of the sizes that they had."""
    shutil.copytree(FIXTURE, to)
    database = to / "mlflow.db.gz"
    (to / "mlflow.db").write_bytes(gzip.decompress(database.read_bytes()))
    database.unlink()
    for head in to.glob(f"runs/*/*/*{HEAD}"):
        write_hollow(
            head.with_name(head.name.removesuffix(HEAD)), gzip.decompress(head.read_bytes())
        )
        head.unlink()
    return to


def make_whole(home: Path, trial: str, step: int) -> None:
    """Let the manifest of a checkpoint name the hash of each file as it lies in the copy."""
    checkpoint = home / "runs" / trial / f"step-{step:06d}"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def write_hollow(file: Path, head: bytes) -> None:
    """A safetensors file with this beginning (the header and its length) and zeros for tensors."""
    tensors = json.loads(head[8:])
    end = max(one["data_offsets"][1] for name, one in tensors.items() if name != "__metadata__")
    with file.open("wb") as opened:
        opened.write(head)
        opened.truncate(len(head) + end)

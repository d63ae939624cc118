"""Runs the real command line in processes of its own, on the pictures and models of the repo."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import services

PICTURES = Path(services.__file__).parent / "demo" / "pictures" / "aya"
# Small enough for a test, large enough to have two trials with two scored checkpoints each.
SWEEP = """
recipe:
  steps: 8
  checkpoint_every: 4
  batch_size: 4
  optimizer: {lr: 1.0e-3}
search:
  network.method: [lora, dora]
  network.rank: [4]
scoring:
  prompts: ["{subject}, smile, red shirt", "{subject}, blue background"]
  unrelated: ["person, micah style, green hair"]
  seeds: 2
  steps: 4
  bootstrap: 200
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP)
    return file


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    return os.environ | {"LORAFARM_HOME": str(home), "COLUMNS": "200", "OMP_NUM_THREADS": "2"}


@pytest.fixture
def command() -> list[str]:
    """The command line of this very interpreter."""
    return [sys.executable, "-m", "services.cli"]


@pytest.fixture
def lorafarm(command: list[str], environment: dict[str, str]) -> Callable[..., str]:
    """Runs a command to its end, expects success, and returns what it printed."""

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [*command, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def frozen(lorafarm: Callable[..., str]) -> None:
    """`aya`, captioned by the models on Ray Serve, and frozen."""
    lorafarm("dataset", "add", "aya", PICTURES, "--trigger", "ayachar")
    lorafarm("dataset", "caption", "aya")
    lorafarm("dataset", "freeze", "aya")

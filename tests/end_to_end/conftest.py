"""Runs the real command line in processes of its own, on the pictures and models of the repo."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import services

PICTURES = Path(services.__file__).parent / "cli" / "demo" / "pictures" / "aya"
# The command line of this very interpreter.
COMMAND = [sys.executable, "-m", "services.cli"]
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
    return environment_of(home)


@pytest.fixture
def command() -> list[str]:
    return COMMAND


@pytest.fixture
def lorafarm(environment: dict[str, str]) -> Callable[..., str]:
    """Runs a command to its end, expects success, and returns what it printed."""
    return lambda *arguments: run(environment, *arguments)


@pytest.fixture(scope="session")
def frozen_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`aya`, captioned by the models on Ray Serve, and frozen: once for all tests."""
    home = tmp_path_factory.mktemp("frozen") / "home"
    environment = environment_of(home)
    run(environment, "dataset", "add", "aya", PICTURES, "--trigger", "ayachar")
    run(environment, "dataset", "caption", "aya")
    run(environment, "dataset", "freeze", "aya")
    return home


@pytest.fixture
def frozen(frozen_home: Path, home: Path) -> None:
    """The same in this test's own home."""
    shutil.copytree(frozen_home, home)


def environment_of(home: Path) -> dict[str, str]:
    return os.environ | {"LORAFARM_HOME": str(home), "COLUMNS": "200", "OMP_NUM_THREADS": "2"}


def run(environment: dict[str, str], *arguments: object) -> str:
    """What the command printed; it must succeed."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}"
    return done.stdout

"""Commands killed or stopped: no process is left, and the next run goes on to the same end."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from services.registry import Registry

pytestmark = pytest.mark.slow

START_TIMEOUT_S = 300
# Ray's own processes look for their parent now and then; its agents are the last to notice.
END_TIMEOUT_S = 120


@pytest.fixture
def training(
    command: list[str], environment: dict[str, str], frozen: None, sweep_file: Path, home: Path
):
    """Starts the sweep and returns once its first checkpoint is there."""
    sweep = [*command, "sweep", "aya", "--config", str(sweep_file)]

    def start() -> subprocess.Popen:
        process = subprocess.Popen(sweep, env=environment, start_new_session=True)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not list(home.glob("runs/*/step-*/manifest.json")):
            assert process.poll() is None, "the sweep ended before its first checkpoint"
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.05)
        return process

    return start


def end(process: subprocess.Popen, with_signal: int) -> int:
    """Send the signal; return the exit code once every process it had started is gone."""
    descendants = psutil.Process(process.pid).children(recursive=True)
    assert descendants, "Ray runs in processes of its own"
    os.kill(process.pid, with_signal)
    code = process.wait(END_TIMEOUT_S)
    _, alive = psutil.wait_procs(descendants, END_TIMEOUT_S)
    assert not [left.cmdline() for left in alive]
    return code


def test_a_killed_sweep_goes_on_and_registers_one_version(
    training: Callable[[], subprocess.Popen], lorafarm: Callable[..., str], sweep_file, home: Path
):
    end(training(), signal.SIGKILL)
    done = {
        file: file.stat().st_mtime_ns for file in home.glob("runs/*/step-*/adapter.safetensors")
    }
    said = lorafarm("sweep", "aya", "--config", sweep_file)
    assert "aya.sd15/1" in said
    assert {file: file.stat().st_mtime_ns for file in done} == done, "no step was trained twice"
    assert len(list(home.glob("runs/*/step-*/scores.json"))) == 4
    registry = Registry(f"sqlite:///{home / 'mlflow.db'}", home / "mlartifacts")
    (version,) = registry.versions("aya.sd15")
    assert version.aliases == ("candidate",)


def test_ctrl_c_ends_the_sweep_with_130_and_leaves_no_process(
    training: Callable[[], subprocess.Popen],
):
    assert end(training(), signal.SIGINT) == 130

"""The main job, every command of the README on the real models, with a kill and a Ctrl-C in it.

No process is left by either, and the next run goes on to the same end.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open

from captioning import Store, latest_dataset
from services.registry.registry import Registry

pytestmark = pytest.mark.slow

START_TIMEOUT_S = 300
# Ray's agents of a killed command try to reach it for a minute before they give up.
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


def end(process: subprocess.Popen, with_signal: int) -> list[psutil.Process]:
    """Send the signal and wait for the process; return those that it had started."""
    descendants = psutil.Process(process.pid).children(recursive=True)
    assert descendants, "Ray runs in processes of its own"
    os.kill(process.pid, with_signal)
    process.wait(END_TIMEOUT_S)
    return descendants


def require_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, END_TIMEOUT_S)
    assert not [left.cmdline() for left in alive]


def test_from_pictures_to_an_exported_adapter_with_a_kill_in_between(
    training: Callable[[], subprocess.Popen],
    lorafarm: Callable[..., str],
    home: Path,
    sweep_file: Path,
    tmp_path: Path,
):
    dataset = latest_dataset(Store(home), "aya")
    captions = [sample.caption for sample in dataset.train + dataset.holdout]
    assert all(caption.startswith("ayachar, person") for caption in captions)
    assert len(set(captions)) > 1
    assert len(dataset.holdout) >= 3

    left_behind = end(training(), signal.SIGKILL)
    done = {
        file: file.stat().st_mtime_ns for file in home.glob("runs/*/step-*/adapter.safetensors")
    }
    said = lorafarm("sweep", "aya", "--config", sweep_file)
    assert "aya.sd15/1" in said
    assert {file: file.stat().st_mtime_ns for file in done} == done, "no step was trained twice"
    require_gone(left_behind)
    runs = sorted((home / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        steps = sorted(folder.name for folder in run.glob("step-*"))
        assert steps == ["step-000004", "step-000008"]
        for step in steps:
            score = json.loads((run / step / "scores.json").read_text())
            assert score["identity"]["low"] <= score["identity"]["value"]

    (scoring,) = json.loads((home / "measurements.json").read_text())["scoring"].values()
    assert scoring["seconds"] > 0

    again = lorafarm("sweep", "aya", "--config", sweep_file)
    assert "2 trials trained and scored before" in again
    registry = Registry(f"sqlite:///{home / 'mlflow.db'}", home / "mlartifacts")
    (version,) = registry.versions("aya.sd15")
    assert version.aliases == ("candidate",)

    report = tmp_path / "report.html"
    assert "identity" in lorafarm("leaderboard", "aya", "--report", report)
    assert "aya.sd15" in report.read_text()

    lorafarm("promote", "aya.sd15", 1, "--to", "production")
    out = tmp_path / "loras"
    lorafarm("export", "aya.sd15@production", "--format", "kohya", "--to", out)
    lorafarm("export", "aya.sd15@production", "--format", "diffusers", "--to", out)
    (kohya,) = out.glob("*.safetensors")
    with safe_open(kohya, "pt") as file:
        assert all(key.startswith("lora_unet_") for key in file.keys())  # noqa: SIM118
        assert file.metadata()["ss_output_name"] == kohya.stem
    assert (out / "diffusers" / "pytorch_lora_weights.safetensors").exists()

    status = lorafarm("status")
    assert "production" in status and "candidate" in status


def test_ctrl_c_ends_the_sweep_with_130_and_leaves_no_process(
    training: Callable[[], subprocess.Popen],
):
    process = training()
    left_behind = end(process, signal.SIGINT)
    assert process.returncode == 130
    require_gone(left_behind)

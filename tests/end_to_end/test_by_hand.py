"""The main job by hand: every command of the README, on the real models, one after the other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from captioning import Store, latest_dataset

pytestmark = pytest.mark.slow


def test_from_a_folder_of_pictures_to_an_exported_adapter(
    lorafarm: Callable[..., str], frozen: None, home: Path, sweep_file: Path, tmp_path: Path
):
    dataset = latest_dataset(Store(home), "aya")
    captions = [sample.caption for sample in dataset.train + dataset.holdout]
    assert all(caption.startswith("ayachar, person") for caption in captions)
    assert len(set(captions)) > 1
    assert len(dataset.holdout) >= 3

    said = lorafarm("sweep", "aya", "--config", sweep_file)
    assert "aya.sd15/1" in said
    runs = sorted((home / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        steps = sorted(folder.name for folder in run.glob("step-*"))
        assert steps == ["step-000004", "step-000008"]
        for step in steps:
            score = json.loads((run / step / "scores.json").read_text())
            assert score["identity"]["low"] <= score["identity"]["value"]

    again = lorafarm("sweep", "aya", "--config", sweep_file)
    assert "aya.sd15/1" in again, "the same sweep must not register a second version"
    assert "2 trials trained and scored before" in again

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

"""A real training process killed with SIGKILL: the next one goes on and ends bit for bit equal."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.checkpoints import list_checkpoints
from training.data.latents import LatentCache
from training.families import load_base
from training.loop import train
from training.recipe import Recipe

RECIPE = Recipe.model_validate(
    {
        "network": {"rank": 4, "method": "dora"},
        "optimizer": {"lr": 1e-3},
        "steps": 12,
        "checkpoint_every": 4,
        "batch_size": 2,
        "seed": 3,
    }
)

PROGRAM = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from training.families import load_base
from training.data.latents import Bucket, LatentCache
from training.events import StepTaken
from training.loop import train
from training.recipe import Recipe

base_path, cache_path, recipe, trial_dir = sys.argv[1:]
torch.set_num_threads(1)
tensors = load_file(cache_path)
text, empty = {"text": tensors.pop("text")}, {"text": tensors.pop("empty_text")}
buckets = (Bucket(tuple(range(len(tensors["mean"]))), **tensors),)
cache = LatentCache(
    key="k", buckets=buckets, text=text, empty_text=empty, prior_text={}, picture={}
)
last = train(
    load_base(base_path), cache, Recipe.model_validate_json(recipe), Path(trial_dir),
    on_event=lambda event: isinstance(event, StepTaken) and print(event.step, flush=True),
)
print("done", last, flush=True)
"""


@pytest.mark.slow
def test_killed_and_started_again(
    tiny_base_path: Path, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(load_base(tiny_base_path), tiny_cache, RECIPE, whole)

    (squares,) = tiny_cache.buckets
    tensors = {name: getattr(squares, name) for name in ("mean", "logvar", "mask")}
    texts = {"text": tiny_cache.text["text"], "empty_text": tiny_cache.empty_text["text"]}
    save_file({**tensors, **texts}, tmp_path / "cache.safetensors")
    arguments = [str(tiny_base_path), str(tmp_path / "cache.safetensors"), RECIPE.model_dump_json()]
    command = [sys.executable, "-c", PROGRAM, *arguments, str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path.cwd()
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "6":  # two steps after the checkpoint of step 4
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert [c.step for c in list_checkpoints(killed)] in ([4], [4, 8])

    # What a kill in the middle of saving leaves behind must not matter.
    (killed / ".writing-step-000008").mkdir(exist_ok=True)
    resumed = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=True, cwd=Path.cwd()
    )
    lines = resumed.stdout.split()
    assert lines[-2:] == ["done", "12"]
    assert int(lines[0]) in (5, 9)

    def losses(trial_dir: Path) -> list[float]:
        text = (trial_dir / "metrics.jsonl").read_text()
        return [json.loads(line)["loss"] for line in text.splitlines()]

    assert losses(killed) == losses(whole)
    for name in ("adapter.safetensors", "state.safetensors", "manifest.json"):
        file = f"step-000012/{name}"
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
    assert sorted(path.name for path in killed.iterdir()) == sorted(
        path.name for path in whole.iterdir()
    )

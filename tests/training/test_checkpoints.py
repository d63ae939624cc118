"""Checkpoints come back as they were saved; a torn one is recognised, named and skipped."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import training.checkpoints as checkpoints
from training.checkpoints import (
    check_checkpoints,
    last_with_state,
    list_checkpoints,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from training.recipe import Recipe

RECIPE = Recipe.model_validate({"network": {"rank": 4}, "seed": 5})
ADAPTER = {"unet.a.lora_A.weight": torch.arange(8.0).reshape(2, 4)}
STATE = {"optimizer/a/step": torch.tensor(3.0), "optimizer/a/exp_avg": torch.ones(2, 4)}


def save(trial_dir: Path, step: int) -> Path:
    return save_checkpoint(trial_dir, step, RECIPE, ADAPTER, STATE).path


def test_contents_come_back(tmp_path: Path) -> None:
    path = save(tmp_path, 500)
    assert path.name == "step-000500"
    assert sorted(file.name for file in path.iterdir()) == [
        "adapter.safetensors",
        "manifest.json",
        "recipe.yaml",
        "state.safetensors",
    ]
    contents = load_checkpoint(path)
    assert (contents.step, contents.recipe) == (500, RECIPE)
    assert torch.equal(contents.adapter["unet.a.lora_A.weight"], ADAPTER["unet.a.lora_A.weight"])
    assert {name: tensor.tolist() for name, tensor in contents.state.items()} == {
        name: tensor.tolist() for name, tensor in STATE.items()
    }


def test_a_recipe_from_before_the_axis_was_a_choice_is_read_as_what_it_trained(
    tmp_path: Path,
) -> None:
    path = save(tmp_path, 500)
    assert load_checkpoint(path).recipe.network.dora_axis == "input"  # as it was saved
    data = yaml.safe_load((path / "recipe.yaml").read_text())
    del data["network"]["dora_axis"]
    (path / "recipe.yaml").write_text(yaml.safe_dump(data))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["recipe.yaml"] = hashlib.sha256(
        (path / "recipe.yaml").read_bytes()
    ).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert load_checkpoint(path).recipe.network.dora_axis == "output"


def test_they_are_listed_by_step(tmp_path: Path) -> None:
    for step in (1_000_000, 200, 999_999):
        save(tmp_path, step)
    (tmp_path / "step-notes").mkdir()
    assert [c.step for c in list_checkpoints(tmp_path)] == [200, 999_999, 1_000_000]
    assert list_checkpoints(tmp_path / "absent") == []


@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "state.safetensors", "recipe.yaml", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["absent", "cut off", "a bit flipped"])
def test_a_torn_checkpoint_is_skipped_with_the_reason(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 100)
    file = save(tmp_path, 200) / name
    data = file.read_bytes()
    if damage == "absent":
        file.unlink()
    elif damage == "cut off":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.write_bytes(bytes([data[0] ^ 4]) + data[1:])
    whole, torn = check_checkpoints(tmp_path)
    assert [c.step for c in whole] == [100]
    assert [t.path.name for t in torn] == ["step-000200"]
    assert name in torn[0].reason or name == "manifest.json"
    with caplog.at_level(logging.WARNING):
        listed = [c.step for c in list_checkpoints(tmp_path)]
        # A list reads no tensors, and so sees no flipped bit; whoever goes on does.
        sees_no_bit = damage == "a bit flipped" and name != "manifest.json"
        assert listed == ([100, 200] if sees_no_bit else [100])
        last = last_with_state(tmp_path)
    assert last is not None and last.step == 100
    assert "step-000200" in caplog.text
    with pytest.raises((OSError, ValueError)):
        load_checkpoint(file.parent)
    save(tmp_path, 200)  # the torn one is replaced
    assert [c.step for c in list_checkpoints(tmp_path)] == [100, 200]


def without_sizes(checkpoint: Path) -> Path:
    """A checkpoint as it was saved before manifests named the sizes of files."""
    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["sizes"]
    file.write_text(json.dumps(manifest, indent=1))
    return checkpoint


@pytest.mark.parametrize("name", ["adapter.safetensors", "state.safetensors", "recipe.yaml"])
@pytest.mark.parametrize("damage", ["absent", "cut off", "emptied", "grown", "a header of junk"])
def test_an_older_manifest_tells_torn_checkpoints_by_the_files_own_headers(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    without_sizes(save(tmp_path, 100))
    assert [c.step for c in list_checkpoints(tmp_path)] == [100]
    file = without_sizes(save(tmp_path, 200)) / name
    data = file.read_bytes()
    damaged = {
        "cut off": data[:-1],
        "emptied": b"",
        "grown": data + b"0",
        "a header of junk": data[:8] + b"?" + data[9:],
    }
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes(damaged[damage])
    assert [c.step for c in list_checkpoints(tmp_path)] == [100]
    assert f"step-000200/{name}" in caplog.text


def test_a_list_reads_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(tmp_path, 100)
    for name in ("adapter.safetensors", "state.safetensors"):
        file = checkpoint / name
        size = file.stat().st_size
        file.unlink()
        with file.open("wb") as hollow:  # of the same size, and with nothing in it
            hollow.truncate(size)
    assert [c.step for c in list_checkpoints(tmp_path)] == [100]
    assert last_with_state(tmp_path) is None


def test_a_renamed_checkpoint_is_not_of_another_step(tmp_path: Path) -> None:
    shutil.move(save(tmp_path, 100), tmp_path / "step-000300")
    assert list_checkpoints(tmp_path) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 100)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "sync_directory", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 200)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000100"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".writing-step-000200"
    left.mkdir()
    (left / "adapter.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []

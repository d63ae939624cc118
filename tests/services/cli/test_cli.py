"""What people see when they get something wrong: a message that names it, exit code 2, no mess."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "scipy", "mlflow", "ray", "diffusers", "transformers", "sklearn", "matplotlib"}


def test_commands_start_without_what_takes_seconds_to_import() -> None:
    said = "import sys, services.cli.main; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def add(lorafarm, folder: Path):
    return lorafarm("dataset", "add", "aya", folder, "--trigger", "ayachar")


def test_a_folder_without_pictures_writes_nothing(lorafarm, tmp_path: Path, home_path: Path):
    folder = tmp_path / "empty"
    folder.mkdir()
    code, _, err = add(lorafarm, folder)
    assert code == 2
    assert str(folder) in err and "Fix:" in err
    assert not home_path.exists()


def test_bad_files_among_good_ones_are_skipped_named_and_counted(lorafarm, pictures: Path):
    whole = (pictures / "00.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "note.png").write_text("this is no picture")
    code, out, _ = add(lorafarm, pictures)
    assert code == 0
    assert "12 pictures" in out and "2 skipped" in out
    assert "cut.png" in out and "note.png" in out


def test_adding_twice_adds_nothing(lorafarm, pictures: Path):
    add(lorafarm, pictures)
    code, _, _ = add(lorafarm, pictures)
    assert code == 0
    code, out, _ = lorafarm("status")
    assert code == 0
    assert "12" in out


@pytest.mark.parametrize("name", ["../evil", "Aya", "", "a b"])
def test_a_name_that_is_no_plain_word_is_refused(lorafarm, pictures: Path, home_path: Path, name):
    code, _, err = lorafarm("dataset", "add", name, pictures, "--trigger", "ayachar")
    assert code == 2
    assert "name" in err
    assert not home_path.exists()


def test_another_trigger_for_a_known_character_is_refused(lorafarm, pictures: Path):
    add(lorafarm, pictures)
    code, _, err = lorafarm("dataset", "add", "aya", pictures, "--trigger", "other")
    assert code == 2
    assert "ayachar" in err


def test_an_unknown_character_is_answered_with_the_nearest_one(lorafarm, dataset):
    code, _, err = lorafarm("dataset", "show", "aja")
    assert code == 2
    assert "did you mean 'aya'?" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: {network: {rnak: 4}}", "did you mean 'rank'?"),
        ("recipe: {network: {rank: 0}}", "recipe.network.rank"),
        ("search: {network.rank: [4, 0]}", "network.rank"),
        ("search: {network.rnak: [4]}", "did you mean 'rank'?"),
        ("search: {network.rank: []}", "network.rank"),
        ("serach: {}", "did you mean 'search'?"),
        ("recipe: [", "not valid YAML"),
        ("base: ./no-such-model", "no-such-model"),
        ("recipe: {network: {targets: 'regex:to_qq$'}}", "network.targets: regex:to_qq$ names no"),
        ("search: {resolution: [64, 60]}", "resolution: 60 px is not a multiple of 8"),
        ("scoring: {size_px: 60}", "scoring: size_px: 60 px is not a multiple of 8"),
        ("recipe: {bucket_step_px: 32}", "bucket_step_px: is 32, but it is read only"),
    ],
)
@pytest.mark.parametrize("command", ["sweep", "estimate"])
def test_a_wrong_sweep_file_says_what_and_where(
    lorafarm, dataset, home_path: Path, tmp_path: Path, command: str, text: str, said: str
):
    config = tmp_path / "sweep.yaml"
    config.write_text(text)
    code, _, err = lorafarm(command, "aya", "--config", config)
    assert code == 2
    assert said in err
    assert not (home_path / "runs").exists()
    assert not (home_path / "sweeps").exists()


def test_a_base_folder_that_is_no_model_names_the_missing_file(lorafarm, dataset, tmp_path: Path):
    (tmp_path / "base").mkdir()
    config = tmp_path / "sweep.yaml"
    config.write_text(f"base: {tmp_path / 'base'}")
    code, _, err = lorafarm("sweep", "aya", "--config", config)
    assert code == 2
    assert "model_index.json" in err


def test_an_embedder_that_is_none_is_named_before_anything_starts(
    lorafarm, dataset, home_path: Path, tmp_path: Path
):
    config = tmp_path / "sweep.yaml"
    config.write_text("scoring: {embedder: /nope}")
    code, out, err = lorafarm("sweep", "aya", "--config", config)
    assert code == 2
    assert f"{config}: scoring.embedder: /nope: there is no such folder" in err
    assert "steps =" not in out
    assert not (home_path / "sweeps").exists()


def test_a_file_where_a_folder_is_meant_is_named(lorafarm, dataset, tmp_path: Path):
    (tmp_path / "file").write_text("")
    code, _, err = lorafarm("dataset", "check", "aya", "--html", tmp_path)
    assert code == 2
    assert f"{tmp_path}: Is a directory" in err
    code, _, err = lorafarm("demo", "--out", tmp_path / "file")
    assert code == 2
    assert f"{tmp_path / 'file'}" in err and "Fix:" in err


def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    lorafarm, pictures: Path, home_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_space(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space)
        code, _, err = add(lorafarm, pictures)
    assert code == 2
    assert "disk is full" in err
    assert not [path for path in home_path.rglob("*") if path.is_file()]
    assert add(lorafarm, pictures)[0] == 0


def test_a_taken_port_is_answered_with_a_free_one(lorafarm, home_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = lorafarm("mlflow", "--port", port)
    assert code == 2
    assert str(port) in err and "--port" in err


def test_leaderboard_before_any_sweep_names_the_next_command(lorafarm, dataset):
    code, _, err = lorafarm("leaderboard", "aya")
    assert code == 2
    assert "lorafarm sweep aya" in err


def test_status_of_an_empty_home_says_how_to_begin(lorafarm):
    code, out, _ = lorafarm("status")
    assert code == 0
    assert "lorafarm dataset add" in out

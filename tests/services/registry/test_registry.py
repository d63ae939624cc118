"""Adapter versions: registered once, found by alias or number, downloaded only when they match."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import mlflow.artifacts
import pytest
from registry_examples import CARD

from captioning import UserError
from services.registry.bundle import AdapterFile, files_from_tag, files_tag
from services.registry.registry import Registry


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("template")
    Registry(f"sqlite:///{home / 'mlflow.db'}", home / "mlartifacts")
    return home / "mlflow.db"


@pytest.fixture
def registry(tmp_path: Path, empty_store: Path) -> Registry:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copyfile(empty_store, home / "mlflow.db")
    return Registry(f"sqlite:///{home / 'mlflow.db'}", home / "mlartifacts")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    exported = tmp_path / "exported"
    (exported / "diffusers").mkdir(parents=True)
    (exported / "aya.safetensors").write_bytes(b"kohya weights")
    (exported / "aya.png").write_bytes(b"picture")
    (exported / "diffusers" / "pytorch_lora_weights.safetensors").write_bytes(b"peft weights")
    return {
        "kohya": exported / "aya.safetensors",
        "diffusers": exported / "diffusers",
        "preview": exported / "aya.png",
    }


def register(registry: Registry, files: dict[str, Path], digit: str = "c") -> int:
    run_id = registry.runs.open_sweep("aya", "s1")
    card = replace(CARD, checkpoint_sha256=digit * 64)
    return registry.register("aya.sd15", run_id, files, card)


def test_registered_adapter_is_found_with_its_facts_and_files(registry, files) -> None:
    version = register(registry, files)
    adapter = registry.resolve(f"aya.sd15/{version}")
    assert (adapter.trial, adapter.step) == ("t0123456789ab", 400)
    assert adapter.identity == "0.62 [0.55, 0.70]"
    assert adapter.tags["base"] == "starter"
    assert adapter.tags["formats"] == "diffusers,kohya"
    assert [file.path for file in adapter.files] == [
        "aya.png",
        "aya.safetensors",
        "diffusers/pytorch_lora_weights.safetensors",
        "adapter.json",
    ]


def test_the_same_checkpoint_never_makes_a_second_version(registry, files) -> None:
    assert register(registry, files) == register(registry, files) == 1
    assert register(registry, files, digit="d") == 2
    assert register(registry, files) == 1
    assert [adapter.version for adapter in registry.versions("aya.sd15")] == [2, 1]


def test_registration_cut_off_before_the_version_exists_is_completed(
    registry, files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for call in ("log_artifact", "create_registered_model", "create_model_version"):
        with monkeypatch.context() as patch:
            patch.setattr(registry._client, call, die)
            with pytest.raises(KeyboardInterrupt):
                register(registry, files)
    assert register(registry, files) == 1
    assert [adapter.version for adapter in registry.list()] == [1]


def test_production_moves_and_leaves_the_old_version_as_previous(registry, files) -> None:
    first, second = register(registry, files), register(registry, files, digit="d")
    for version in (first, second, second):  # promoting twice must not lose `previous`
        registry.set_alias("aya.sd15", version, "production")
    assert registry.resolve("aya.sd15@production").version == second
    assert registry.resolve("aya.sd15@previous").version == first

    registry.set_alias("aya.sd15", first, "production")  # a rollback
    assert registry.resolve("aya.sd15@production").version == first
    assert registry.resolve("aya.sd15@previous").version == second
    assert registry.resolve("aya.sd15@previous").aliases == ("previous",)


def test_candidate_moves_without_touching_production(registry, files) -> None:
    first, second = register(registry, files), register(registry, files, digit="d")
    registry.set_alias("aya.sd15", first, "production")
    registry.set_alias("aya.sd15", first, "candidate")
    registry.set_alias("aya.sd15", second, "candidate")
    assert registry.resolve("aya.sd15/1").aliases == ("production",)
    assert registry.resolve("aya.sd15/2").aliases == ("candidate",)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("aya.sd51@production", "did you mean 'aya.sd15'?"),
        ("aya.sd15@prodution", "did you mean 'production'?"),
        ("aya.sd15@candidate", "@production (version 1)"),
        ("aya.sd15/7", "aya.sd15 has: 1"),
        ("aya.sd15", "name@alias nor name/version"),
        ("aya.sd15/first", "name@alias nor name/version"),
    ],
)
def test_unknown_reference_says_what_there_is(registry, files, reference, expected) -> None:
    registry.set_alias("aya.sd15", register(registry, files), "production")
    with pytest.raises(UserError) as raised:
        registry.resolve(reference)
    assert expected in str(raised.value)


def test_empty_registry_says_so(registry) -> None:
    assert list(registry.list()) == []
    with pytest.raises(UserError, match="none yet"):
        registry.resolve("aya.sd15@production")


@pytest.mark.parametrize("alias", ["latest", "v3", "Production", "a b", ""])
def test_impossible_alias_is_refused(registry, files, alias: str) -> None:
    version = register(registry, files)
    with pytest.raises(UserError, match="alias"):
        registry.set_alias("aya.sd15", version, alias)


def test_alias_to_an_unknown_version_is_refused(registry, files) -> None:
    register(registry, files)
    with pytest.raises(UserError, match="no such version"):
        registry.set_alias("aya.sd15", 9, "production")


def test_impossible_name_is_refused(registry, files) -> None:
    with pytest.raises(UserError, match="adapter name"):
        registry.register("aya/sd15", "run", files, CARD)


def test_download_gives_the_registered_bytes_twice_over(registry, files, tmp_path: Path) -> None:
    register(registry, files)
    _, placed = registry.download("aya.sd15/1", tmp_path / "models")
    assert (tmp_path / "models" / "aya.safetensors").read_bytes() == b"kohya weights"
    assert (tmp_path / "models" / "diffusers").is_dir()
    card = json.loads((tmp_path / "models" / "adapter.json").read_text())
    assert card["scores"]["identity"]["low"] == 0.551
    assert card["trigger"] == "ayachar"
    stamps = [path.stat().st_mtime_ns for path in placed]
    assert [
        path.stat().st_mtime_ns for path in registry.download("aya.sd15/1", placed[0].parent)[1]
    ] == stamps
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [
        "adapter.json",
        "aya.png",
        "aya.safetensors",
        "diffusers",
    ]


@pytest.mark.parametrize(
    ("format", "placed"),
    [("kohya", ["aya.safetensors"]), ("diffusers", ["diffusers/pytorch_lora_weights.safetensors"])],
)
def test_one_format_can_be_downloaded_alone(registry, files, tmp_path, format, placed) -> None:
    register(registry, files)
    _, found = registry.download("aya.sd15/1", tmp_path / "models", format)
    assert [path.relative_to(tmp_path / "models").as_posix() for path in found] == placed
    present = [path for path in (tmp_path / "models").rglob("*") if path.is_file()]
    assert sorted(present) == sorted(found)


def test_format_that_was_not_exported_is_explained(registry, files, tmp_path: Path) -> None:
    register(registry, {"kohya": files["kohya"]})
    with pytest.raises(UserError, match=r"no diffusers file.*kohya"):
        registry.download("aya.sd15/1", tmp_path / "models", "diffusers")
    assert not (tmp_path / "models").exists()


def test_damaged_artifact_is_never_placed(registry, files, tmp_path: Path) -> None:
    register(registry, files)
    [stored] = (tmp_path / "home" / "mlartifacts").rglob("aya.safetensors")
    stored.write_bytes(b"kohya weighty")
    with pytest.raises(UserError, match="sha256"):
        registry.download("aya.sd15/1", tmp_path / "models")
    assert not (tmp_path / "models" / "aya.safetensors").exists()


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a\\..\\x"])
def test_file_path_that_leaves_its_folder_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="refused"):
        files_from_tag("aya.sd15/1", files_tag([AdapterFile(path, "0" * 64, 1)]))


def test_two_files_of_one_name_are_refused(registry, files, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "aya.safetensors").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"aya\.safetensors"):
        register(registry, {**files, "second": other / "aya.safetensors"})


def test_stock_mlflow_finds_the_files_by_alias(
    registry, files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
    registry.set_alias("aya.sd15", register(registry, files), "production")
    folder = mlflow.artifacts.download_artifacts(
        "models:/aya.sd15@production", dst_path=str(tmp_path / "stock")
    )
    assert (Path(folder) / "aya.safetensors").read_bytes() == b"kohya weights"


def test_new_store_is_made_quietly_in_the_home_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    registry = Registry(f"sqlite:///{home / 'mlflow.db'}", home / "mlartifacts")
    registry.runs.open_sweep("aya", "s1")
    logging.getLogger("alembic").info("would be shown")
    assert capfd.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert sorted(path.name for path in home.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def test_empty_tracking_uri_and_a_file_that_is_no_database_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty address"):
        Registry(" ")
    (tmp_path / "mlflow.db").write_text("not a database, only some text that is long enough")
    with pytest.raises(UserError, match="cannot read it"):
        Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "a")


def _open(home: Path) -> None:
    Registry(f"sqlite:///{home / 'mlflow.db'}", home / "mlartifacts")


@pytest.mark.slow
def test_store_whose_making_was_killed_is_made_again(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_open, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".mlflow-new-*/mlflow.db")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "mlflow.db").exists()
    _open(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]

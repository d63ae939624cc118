"""The kept list of adapters is MLflow's own, and is given up as soon as the registry changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from registry_examples import CARD

from captioning import UserError
from services.farm.settings import Home, Settings
from services.registry import listing
from services.registry.listing import LISTED_FILE, registered_adapters
from services.registry.registry import Registry
from services.registry.releases import promote


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """An embedded store with one registered version."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    register(Registry(uri, tmp_path / "mlartifacts"), tmp_path, "c" * 64)
    return uri


def register(registry: Registry, folder: Path, sha256: str) -> None:
    weights = folder / "aya.safetensors"
    weights.write_bytes(b"weights")
    run = registry.runs.open_sweep("aya", "s1")
    card = replace(CARD, checkpoint_sha256=sha256)
    registry.register("aya.sd15", run, {"kohya": weights}, card)


def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("MLflow was asked")

    monkeypatch.setattr(listing, "Registry", asked)


def test_an_unchanged_registry_is_listed_without_mlflow(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Registry(uri, tmp_path / "mlartifacts").list()
    assert registered_adapters(uri, None) == expected
    without_mlflow(monkeypatch)
    assert registered_adapters(uri, None) == expected


def test_every_change_of_the_registry_is_seen(uri: str, tmp_path: Path) -> None:
    registry = Registry(uri, tmp_path / "mlartifacts")
    assert len(registered_adapters(uri, None)) == 1
    register(registry, tmp_path, "d" * 64)
    assert len(registered_adapters(uri, None)) == 2
    registry.set_alias("aya.sd15", 2, "production")
    assert registered_adapters(uri, None)[0].aliases == ("production",)
    registry.runs._client.set_model_version_tag("aya.sd15", "2", "seen", "by a person")
    assert registered_adapters(uri, None)[0].tags["seen"] == "by a person"
    registry.runs._client.delete_model_version("aya.sd15", "1")
    assert [adapter.version for adapter in registered_adapters(uri, None)] == [2]


def test_after_a_promotion_the_list_is_there_without_mlflow(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path, Settings())
    assert home.tracking_uri == uri
    promote(home, "aya.sd15", 1)
    without_mlflow(monkeypatch)
    assert registered_adapters(uri, None)[0].aliases == ("production",)


def test_runs_that_are_recorded_leave_the_list_as_it_is(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = registered_adapters(uri, None)
    Registry(uri, tmp_path / "mlartifacts").runs.open_sweep("ben", "s2")
    without_mlflow(monkeypatch)
    assert registered_adapters(uri, None) == expected


def test_a_list_of_another_version_of_the_farm_is_made_again(uri: str, tmp_path: Path) -> None:
    expected = registered_adapters(uri, None)
    (tmp_path / LISTED_FILE).write_text('{"rows": "", "versions": []}')
    assert registered_adapters(uri, None) == expected


def test_a_file_that_is_no_database_is_explained_by_mlflow(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database")
    with pytest.raises(UserError, match="MLflow cannot read it"):
        registered_adapters(f"sqlite:///{tmp_path / 'mlflow.db'}", None)

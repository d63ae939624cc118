"""A sweep's winner is registered once, and listed afterwards without MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest
from score_examples import score

from captioning import DatasetVersion, content_hash
from services.farm.settings import Home, Settings
from services.registry import listing
from services.registry.exports import exports_dir, exports_of, write_exports
from services.registry.listing import registered_adapters
from services.registry.registry import Registry
from services.registry.winner import register_winner
from services.sweeps.files import record_sweep
from services.sweeps.leaderboard import leaderboard
from services.sweeps.plan import SweepConfig
from services.sweeps.prepare import plan_config
from training import ExportReport
from training.checkpoints import save_checkpoint


def test_a_registered_winner_is_listed_without_mlflow(
    home_path: Path, dataset: DatasetVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(home_path, Settings(cpus_per_worker=1, use_gpu=False))
    config = SweepConfig.model_validate({"recipe": {"steps": 20}})
    base, plan, resolved = plan_config(home, dataset, config, "test")
    asked = record_sweep(home.store, dataset, plan, resolved, base)
    (planned,) = plan.trials
    checkpoint = save_checkpoint(home.store.runs / planned.trial, 20, planned.recipe, {}, {}).path
    score(0.5).save(checkpoint)
    sha256 = content_hash(checkpoint / "adapter.safetensors")
    folder = exports_dir(home.store, "aya", sha256)
    reports = (
        exported(folder, "kohya", "aya.safetensors"),
        exported(folder, "diffusers", "diffusers/pytorch_lora_weights.safetensors"),
    )
    write_exports(folder, *reports)
    winner = leaderboard(home, "aya").winner
    assert exports_of(home.store, "aya", winner.candidate) == tuple(
        (folder, report) for report in reports
    )
    registry = Registry(home.tracking_uri, home.artifacts)
    run_ids = {planned.trial: registry.runs.open_sweep("aya", asked.sweep)}
    first = register_winner(home, asked, dataset, winner, registry, run_ids)
    assert register_winner(home, asked, dataset, winner, registry, run_ids) == first
    expected = registry.list()

    def asked_again(*_: object) -> None:
        raise AssertionError("MLflow was asked")

    monkeypatch.setattr(listing, "Registry", asked_again)
    listed = registered_adapters(home.tracking_uri, home.artifacts)
    assert listed == expected
    assert [(one.name, one.version, one.aliases) for one in listed] == [
        (first.name, first.version, ("candidate",))
    ]


def exported(folder: Path, format: str, name: str) -> ExportReport:
    """A file that stands for an exported one, with its report."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(format.encode())
    form = "lora" if format == "kohya" else "peft"
    size = file.stat().st_size
    return ExportReport(file, format, form, content_hash(file), size, 1, 0.0, 0.1)

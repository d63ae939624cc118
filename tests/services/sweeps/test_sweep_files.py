"""Sweeps on disk: which of them a leaderboard and a report are of."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from score_examples import score

from captioning import DatasetVersion, UserError
from services.cli.leaderboard import leaderboard_command
from services.farm.settings import Home, Settings
from services.sweeps import files as sweep_files
from services.sweeps.files import choose_whole, newest_scored, record_sweep
from services.sweeps.plan import SweepConfig
from services.sweeps.prepare import plan_config
from training.checkpoints import save_checkpoint


def test_a_sweep_that_failed_hides_none_that_is_scored(
    home_path: Path, dataset: DatasetVersion, monkeypatch: pytest.MonkeyPatch
):
    home = Home(home_path, Settings(cpus_per_worker=1, use_gpu=False))
    sweeps = []
    for hour, seed in enumerate((1, 2)):
        asked = SweepConfig.model_validate({"recipe": {"steps": 20, "seed": seed}})
        base, plan, resolved = plan_config(home, dataset, asked, "test")
        monkeypatch.setattr(sweep_files, "datetime", Clock(hour))
        sweeps.append((plan, record_sweep(home.store, dataset, plan, resolved, base)))
    with pytest.raises(UserError, match=f"{sweeps[1][1].sweep}: no scored checkpoint yet"):
        newest_scored(home.store, "aya", 1)
    (planned,) = sweeps[0][0].trials
    folder = home.store.runs / planned.trial
    score(0.5).save(save_checkpoint(folder, 20, planned.recipe, {}, {}).path)
    out = io.StringIO()
    leaderboard_command(home, "aya", None, Console(file=out, width=200))
    failed, shown = sweeps[1][1].sweep, sweeps[0][1].sweep
    assert (
        f"nothing of the newest sweep, {failed}, is scored yet; this is {shown}" in out.getvalue()
    )
    assert "0.50" in out.getvalue()


def test_a_damaged_checkpoint_wins_nothing(
    home_path: Path, dataset: DatasetVersion, caplog: pytest.LogCaptureFixture
):
    home = Home(home_path, Settings(cpus_per_worker=1, use_gpu=False))
    asked = SweepConfig.model_validate({"recipe": {"steps": 20, "checkpoint_every": 10}})
    base, plan, resolved = plan_config(home, dataset, asked, "test")
    record_sweep(home.store, dataset, plan, resolved, base)
    (planned,) = plan.trials
    folder = home.store.runs / planned.trial
    for step, identity in ((10, 0.4), (20, 0.8)):
        path = save_checkpoint(folder, step, planned.recipe, {}, {}).path
        score(identity).save(path)
    found = newest_scored(home.store, "aya", 1)
    limits = found.asked.config.scoring.limits
    best = choose_whole(home.store, found.candidates, limits)
    assert best is not None and best.candidate.step == 20
    adapter = path / "adapter.safetensors"
    data = adapter.read_bytes()
    adapter.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the same size
    best = choose_whole(home.store, found.candidates, limits)
    assert best is not None and [s.candidate.step for s in best.table] == [10]
    assert "step-000020" in caplog.text
    assert choose_whole(home.store, [c for c in found.candidates if c.step == 20], limits) is None


class Clock:
    """A clock that stands at a given hour, since sweeps are dated to the second."""

    def __init__(self, hour: int) -> None:
        self._hour = hour

    def now(self, _zone: object) -> Clock:
        return self

    def isoformat(self, timespec: str) -> str:
        return f"2026-11-22T{self._hour:02d}:00:00+00:00"

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
from services.report.sweep_report import character_report
from services.sweeps import files as sweep_files
from services.sweeps.files import (
    choose_whole,
    is_best_whole,
    is_scored,
    newest_scored,
    record_sweep,
)
from services.sweeps.leaderboard import leaderboard
from services.sweeps.plan import SweepConfig
from services.sweeps.prepare import plan_config
from training import checkpoint_files
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
    folders = scored_steps(home, dataset, {10: 0.4, 20: 0.8})
    found = newest_scored(home.store, "aya", 1)
    limits = found.asked.config.scoring.limits
    best = choose_whole(home.store, found.candidates, limits)
    assert best is not None and best.candidate.step == 20
    damage(folders[20])
    best = choose_whole(home.store, found.candidates, limits)
    assert best is not None and [s.candidate.step for s in best.table] == [10]
    assert "step-000020" in caplog.text
    assert choose_whole(home.store, [c for c in found.candidates if c.step == 20], limits) is None


def test_leaderboard_and_report_leave_the_damaged_checkpoint_out_as_a_sweep_does(
    home_path: Path, dataset: DatasetVersion
):
    home = Home(home_path, Settings(cpus_per_worker=1, use_gpu=False))
    folders = scored_steps(home, dataset, {10: 0.4, 20: 0.8})
    before = leaderboard(home, "aya")
    assert before.winner.candidate.step == 20
    damage(folders[20])
    found = leaderboard(home, "aya")
    limits = found.sweep.asked.config.scoring.limits
    assert found.winner == choose_whole(home.store, found.sweep.candidates, limits)
    assert [one.candidate.step for one in found.winner.table] == [10]
    damage(folders[10])
    with pytest.raises(UserError, match="every scored checkpoint is damaged"):
        leaderboard(home, "aya")
    with pytest.raises(UserError, match="every scored checkpoint is damaged"):
        character_report(home, "aya")


def test_whether_a_sweep_is_done_reads_the_bytes_of_the_best_checkpoint_only(
    home_path: Path, dataset: DatasetVersion, monkeypatch: pytest.MonkeyPatch
):
    home = Home(home_path, Settings(cpus_per_worker=1, use_gpu=False))
    folders = scored_steps(home, dataset, {10: 0.4, 20: 0.8})
    found = newest_scored(home.store, "aya", 1)
    limits = found.asked.config.scoring.limits
    read = []
    verified = checkpoint_files.read_verified

    def counted(path: Path) -> dict[str, bytes]:
        read.append(path)
        return verified(path)

    monkeypatch.setattr(checkpoint_files, "read_verified", counted)
    assert is_scored(found.plan, found.candidates)
    assert is_best_whole(home.store, found.candidates, limits)
    assert read == [folders[20]]
    damage(folders[10])
    assert is_best_whole(home.store, found.candidates, limits)
    damage(folders[20])
    assert not is_best_whole(home.store, found.candidates, limits)
    assert not is_scored(found.plan, found.candidates[:1])


def scored_steps(
    home: Home, dataset: DatasetVersion, identities: dict[int, float]
) -> dict[int, Path]:
    """A recorded sweep of one trial; gives its checkpoint folders, each scored, by step."""
    asked = SweepConfig.model_validate({"recipe": {"steps": 20, "checkpoint_every": 10}})
    base, plan, resolved = plan_config(home, dataset, asked, "test")
    record_sweep(home.store, dataset, plan, resolved, base)
    (planned,) = plan.trials
    folders = {}
    for step, identity in identities.items():
        trial_dir = home.store.runs / planned.trial
        folders[step] = save_checkpoint(trial_dir, step, planned.recipe, {}, {}).path
        score(identity).save(folders[step])
    return folders


def damage(checkpoint: Path) -> None:
    """Change a bit of the adapter, and leave the file's size as it was."""
    adapter = checkpoint / "adapter.safetensors"
    data = adapter.read_bytes()
    adapter.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


class Clock:
    """A clock that stands at a given hour, since sweeps are dated to the second."""

    def __init__(self, hour: int) -> None:
        self._hour = hour

    def now(self, _zone: object) -> Clock:
        return self

    def isoformat(self, timespec: str) -> str:
        return f"2026-11-22T{self._hour:02d}:00:00+00:00"

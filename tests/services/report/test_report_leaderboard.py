"""The order of the leaderboard, and what is read from a trial's folder."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import report_examples as examples
from hypothesis import given
from hypothesis import strategies as st

from services.report import (
    CheckpointResult,
    TrialResult,
    WinnerChoice,
    installed_versions,
    read_trial,
)
from services.report.leaderboard import leaderboard_rows
from services.sweeps.trial_files import MEASURES, Interval, read_measures, read_samples

checkpoints = st.builds(
    CheckpointResult,
    step=st.integers(1, 5),
    measures=st.one_of(st.none(), st.floats(-0.5, 1.5).map(examples.measures)),
    failed_guards=st.sampled_from([(), ("drift",), ("drift", "fidelity")]),
)
trials = st.lists(
    st.builds(
        TrialResult,
        trial=st.uuids().map(str),
        method=st.just("lora"),
        rank=st.sampled_from([4, 8]),
        seconds=st.just(1.0),
        checkpoints=st.lists(checkpoints, max_size=4, unique_by=lambda c: c.step).map(tuple),
    ),
    max_size=4,
).map(tuple)


@given(trials=trials, data=st.data())
def test_winner_first_then_passing_ones_by_identity(trials, data) -> None:
    scored = [(t, c) for t in trials for c in t.checkpoints if c.measures]
    choice = data.draw(st.sampled_from(scored)) if scored else None
    winner = WinnerChoice(choice[0].trial, choice[1].step, "") if choice else None
    whole = replace(
        examples.character(), trials=trials, winner=winner, base_pictures=(), prompts=()
    )
    rows = leaderboard_rows(whole)
    assert len(rows) == sum(len(trial.checkpoints) for trial in trials)
    assert [row.winner for row in rows].count(True) == (1 if choice else 0)
    assert not choice or rows[0].winner
    others = [row.checkpoint for row in rows if not row.winner]
    groups = [9 if not c.measures else len(c.failed_guards) for c in others]
    assert groups == sorted(groups)
    for one, next_one in itertools.pairwise(others):
        if one.measures and next_one.measures and one.failed_guards == next_one.failed_guards:
            assert one.measures["identity"].value >= next_one.measures["identity"].value


def write_trial(folder: Path) -> None:
    # In a pack of two for the first half, alone for the rest.
    rows = [
        {"step": step, "loss": 1 / step, "step_ms": 500, "pack": 2 if step < 3 else 1}
        for step in (1, 2, 3, 4)
    ]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (2, 4):
        (folder / f"step-{step:06d}").mkdir()
    score = {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in MEASURES}
    pictures = [
        {
            "file": f"samples/{kind}-{seed}.png",
            "kind": kind,
            "seed_index": seed,
            "prompt": "smiling",
        }
        for kind in ("subject", "unrelated")
        for seed in (0, 1)
    ]
    (folder / "step-000004" / "scores.json").write_text(json.dumps(score | {"pictures": pictures}))
    (folder / "step-000006.tmp").mkdir()


def test_trial_is_read_from_what_it_left_on_disk(tmp_path: Path) -> None:
    write_trial(tmp_path / "t1")
    found = read_trial(
        tmp_path / "t1", trial="t1", method="lora", rank=8, failed_guards={4: ("drift",)}
    )
    assert found.title == "rank 8 LoRA"
    assert found.seconds == 1.5, "its share of the time, so that trials add up"
    assert found.losses[-1] == (4, 0.25)
    assert [c.step for c in found.checkpoints] == [2, 4]
    assert found.checkpoints[0].measures is None
    measures = found.checkpoints[1].measures
    assert measures is not None
    assert measures["identity"] == Interval(0.5, 0.4, 0.6)
    assert found.checkpoints[1].failed_guards == ("drift",)
    folder = tmp_path / "t1" / "step-000004"
    assert found.checkpoints[1].pictures == (folder / "samples" / "subject-0.png",)
    assert [sample.prompt for sample in read_samples(folder)] == ["smiling"]


def test_score_without_a_measure_names_its_file(tmp_path: Path) -> None:
    write_trial(tmp_path / "t1")
    (tmp_path / "t1" / "step-000004" / "scores.json").write_text('{"identity": {"value": 1}}')
    with pytest.raises(ValueError, match=r"scores\.json: measure 'low'"):
        read_trial(tmp_path / "t1", trial="t1", method="lora", rank=8)


def test_versions_name_what_decides_a_result() -> None:
    assert {"python", "torch", "diffusers", "peft"} <= installed_versions().keys()


def test_equal_titles_are_told_apart_by_their_ids() -> None:
    whole = examples.character()
    first = replace(whole.trials[0], trial="taaaa1111111")
    second = replace(whole.trials[0], trial="tbbbb1111111")
    twins = replace(whole, trials=(first, second), winner=None)
    assert twins.title(first) == "rank 4 LoRA (taaaa)"
    assert whole.title(whole.trials[0]) == "rank 4 LoRA"


def test_score_as_training_writes_it_is_read(tmp_path: Path) -> None:
    from training.scoring.measures import Interval as Measured
    from training.scoring.prompts import ScoringConfig, plan_cells
    from training.scoring.scores import Picture, Score

    config = ScoringConfig()
    cells = plan_cells(config, "ayachar", "person")
    measured = {
        name: Measured(value=0.5, low=0.4, high=0.6)
        for name in (*MEASURES, "identity_raw", "prompt_cosine", "base_identity")
    }
    score = Score(
        **measured,
        base_key="k",
        identities=(0.5,),
        floor=0.1,
        ceiling=0.9,
        identity_normalised=True,
        prompt_fidelity_normalised=True,
        references="holdout",
        reference_count=3,
        embedder="clip",
        embedder_revision="1",
        config=config,
        pictures=tuple(Picture.of(cell) for cell in cells),
    )
    score.save(tmp_path)
    found = read_measures(tmp_path)
    assert found == dict.fromkeys(MEASURES, Interval(0.5, 0.4, 0.6))
    assert tuple(sample.file for sample in read_samples(tmp_path)) == score.row(tmp_path)
    assert [s.prompt for s in read_samples(tmp_path)] == [
        prompt.replace("{subject}", "ayachar, person") for prompt in config.prompts
    ]

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
from score_examples import score

from captioning import UserError
from services.report.data import (
    TrialResult,
    WinnerChoice,
    checkpoint_result,
    installed_versions,
    read_trial,
)
from services.report.leaderboard import leaderboard_rows
from training import (
    MEASURES,
    Candidate,
    Interval,
    Limits,
    Score,
    ScoringConfig,
    Standing,
    choose_winner,
    read_score,
)
from training.scoring.prompts import plan_cells
from training.scoring.scores import Picture

# A checkpoint's identity and how many guards it fails; None: it was not scored.
results = st.one_of(st.none(), st.tuples(st.floats(-0.5, 1.5), st.sampled_from([0, 1, 2])))
trials = st.dictionaries(
    keys=st.uuids().map(str),
    values=st.tuples(
        st.sampled_from([4, 8]), st.dictionaries(st.integers(1, 5), results, max_size=4)
    ),
    max_size=4,
)


def scored(identity: float, failing: int) -> Score:
    """A score that fails so many guards."""
    bad = Interval(value=0.99, low=0.99, high=0.99)
    return score(identity).model_copy(
        update=dict.fromkeys(("drift", "memorisation")[:failing], bad)
    )


@given(trials=trials)
def test_winner_first_then_passing_ones_by_identity(trials) -> None:
    candidates = [
        Candidate(trial, step, rank, "lora", scored(*result))
        for trial, (rank, checkpoints) in trials.items()
        for step, result in checkpoints.items()
        if result is not None
    ]
    ranking = choose_winner(candidates, Limits()) if candidates else None
    table = ranking.table if ranking else ()
    standings = {(s.candidate.trial, s.candidate.step): s for s in table}
    whole = replace(
        examples.character(),
        trials=tuple(
            TrialResult(
                trial,
                "lora",
                rank,
                1.0,
                tuple(
                    checkpoint_result(step, Path(), standings.get((trial, step)))
                    for step in checkpoints
                ),
            )
            for trial, (rank, checkpoints) in trials.items()
        ),
        winner=WinnerChoice(ranking.candidate.trial, ranking.candidate.step, "")
        if ranking
        else None,
        base_pictures=(),
        prompts=(),
    )
    rows = leaderboard_rows(whole)
    assert len(rows) == sum(len(checkpoints) for _, checkpoints in trials.values())
    assert [row.winner for row in rows].count(True) == (1 if ranking else 0)
    assert not ranking or rows[0].winner
    ranked = [(row.trial.trial, row.checkpoint.step) for row in rows if row.place is not None]
    assert ranked == list(standings), "there is one ranking, that of `choose_winner`"
    assert [row.place for row in rows[: len(ranked)]] == list(range(1, len(ranked) + 1))
    others = [row.checkpoint for row in rows if not row.winner]
    groups = [9 if not c.measures else len(c.failed_guards) for c in others]
    assert groups == sorted(groups)
    for one, next_one in itertools.pairwise(others):
        if one.measures and next_one.measures and one.failed_guards == next_one.failed_guards:
            assert one.measures["identity"].value >= next_one.measures["identity"].value


def test_a_tie_stands_where_the_sweep_puts_it_and_not_where_its_identity_would() -> None:
    """Fewer steps win a tie, and guards count before identity, in the one ranking."""
    late, early, failing = (0.62, 400), (0.6, 100), (0.9, 200)
    candidates = [
        Candidate("t1", step, 8, "lora", scored(identity, 1 if identity == 0.9 else 0))
        for identity, step in (late, early, failing)
    ]
    wide = [
        replace(c, score=c.score.model_copy(update={"identities": (0.0, 0.6, 1.2)}))
        for c in candidates
    ]
    ranking = choose_winner(wide, Limits())
    assert [s.candidate.step for s in ranking.table] == [100, 400, 200]
    result = TrialResult(
        "t1",
        "lora",
        8,
        1.0,
        tuple(checkpoint_result(s.candidate.step, Path(), s) for s in ranking.table[::-1]),
    )
    choice = WinnerChoice("t1", 100, ranking.reason)
    whole = replace(
        examples.character(), trials=(result,), winner=choice, base_pictures=(), prompts=()
    )
    rows = leaderboard_rows(whole)
    assert [(row.place, row.checkpoint.step) for row in rows] == [(1, 100), (2, 400), (3, 200)]


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
    pictures = tuple(
        Picture(
            file=f"samples/{kind}-{seed}.png",
            kind=kind,
            prompt_index=0,
            seed_index=seed,
            prompt="smiling",
            seed=seed,
        )
        for kind in ("subject", "unrelated")
        for seed in (0, 1)
    )
    measures = dict.fromkeys(MEASURES, Interval(value=0.5, low=0.4, high=0.6))
    whole = score(0.5).model_copy(update={**measures, "pictures": pictures})
    whole.save(folder / "step-000004")
    (folder / "step-000006.tmp").mkdir()


def test_trial_is_read_from_what_it_left_on_disk(tmp_path: Path) -> None:
    write_trial(tmp_path / "t1")
    folder = tmp_path / "t1" / "step-000004"
    kept = read_score(folder)
    assert kept is not None
    standing = Standing(Candidate("t1", 4, 8, "lora", kept), 1, False, ("drift",))
    found = read_trial(tmp_path / "t1", trial="t1", method="lora", rank=8, standings={4: standing})
    assert found.title == "rank 8 LoRA"
    assert found.seconds == 1.5, "its share of the time, so that trials add up"
    assert found.losses[-1] == (4, 0.25)
    assert [c.step for c in found.checkpoints] == [2, 4]
    assert found.checkpoints[0].measures is None
    measures = found.checkpoints[1].measures
    assert measures is not None
    assert measures["identity"] == Interval(value=0.5, low=0.4, high=0.6)
    assert found.checkpoints[1].failed_guards == ("drift",)
    assert found.checkpoints[1].pictures == (folder / "samples" / "subject-0.png",)
    assert {picture.prompt for picture in kept.pictures} == {"smiling"}


def test_score_without_a_measure_names_its_file(tmp_path: Path) -> None:
    write_trial(tmp_path / "t1")
    (tmp_path / "t1" / "step-000004" / "scores.json").write_text('{"identity": {"value": 1}}')
    with pytest.raises(UserError, match=r"scores\.json: .*identity\.low"):
        read_score(tmp_path / "t1" / "step-000004")


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
    config = ScoringConfig()
    cells = plan_cells(config, "ayachar", "person")
    measured = {
        name: Interval(value=0.5, low=0.4, high=0.6)
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
    found = read_score(tmp_path)
    assert found is not None
    assert found.measures() == dict.fromkeys(MEASURES, Interval(value=0.5, low=0.4, high=0.6))
    assert found.row(tmp_path) == score.row(tmp_path)
    shown = [p for p in found.pictures if p.kind == "subject" and p.seed_index == 0]
    assert tuple(tmp_path / picture.file for picture in shown) == score.row(tmp_path)
    assert [picture.prompt for picture in shown] == [
        prompt.replace("{subject}", "ayachar, person") for prompt in config.prompts
    ]
    assert read_score(tmp_path / "of nothing") is None

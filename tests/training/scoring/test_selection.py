"""The choice of the winner: guards, ties, and a reason that reads well."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_candidates import PICTURES, candidate

from captioning import UserError
from training.scoring.prompts import Limits
from training.scoring.selection import Candidate, choose_winner, failed_guards

LIMITS = Limits(prompt_fidelity_min=0.5, drift_max=0.4, memorisation_max=0.5)


def test_the_highest_identity_wins_when_it_is_clear() -> None:
    best = candidate(0.83, 800, 16, method="dora")
    winner = choose_winner([candidate(0.5), best, candidate(0.6, 400)], LIMITS)
    assert winner.candidate is best and winner.passed_guards and winner.above_base
    assert winner.reason == (
        "rank 16 DoRA at step 800: highest identity 0.83 [0.81, 0.85], clear of the next "
        "(rank 4 LoRA at step 400: 0.60 [0.58, 0.62])."
    )
    assert [row.place for row in winner.table] == [1, 2, 3]
    assert [row.candidate.score.identity.value for row in winner.table] == [0.83, 0.6, 0.5]
    assert [row.tied for row in winner.table] == [True, False, False]


def test_the_only_checkpoint_wins_without_comparison() -> None:
    assert choose_winner([candidate(0.8)], LIMITS).reason == (
        "rank 4 LoRA at step 200: highest identity 0.80 [0.78, 0.82]."
    )


def test_a_tie_goes_to_fewer_steps() -> None:
    early, late = candidate(0.82, 200), candidate(0.83, 400)
    winner = choose_winner([late, early], LIMITS)
    assert winner.candidate is early
    assert winner.reason == (
        "rank 4 LoRA at step 200: identity 0.82 [0.80, 0.84], tied with the highest (rank 4 LoRA "
        "at step 400: 0.83 [0.81, 0.85]) and preferred for fewer steps."
    )


def test_checkpoints_are_compared_picture_by_picture() -> None:
    early, late = candidate(0.6, 200, width=0.1, luck=1), candidate(0.65, 400, width=0.1, luck=1)
    assert choose_winner([early, late], LIMITS).candidate is late, "better on every picture"
    other = candidate(0.65, 400, width=0.1, luck=2)
    assert choose_winner([early, other], LIMITS).candidate is early, "better on some, worse on some"


def test_the_highest_of_a_tie_wins_when_it_also_has_the_fewest_steps() -> None:
    best = candidate(0.83, 200, width=0.04)
    others = [candidate(0.82, 400), candidate(0.81, 600), candidate(0.80, 800)]
    assert choose_winner([*others, best], LIMITS).reason == (
        "rank 4 LoRA at step 200: highest identity 0.83 [0.79, 0.87]; tied with rank 4 LoRA at "
        "step 400 (0.82), rank 4 LoRA at step 600 (0.81) and 1 more, and preferred for fewer "
        "steps."
    )


def test_at_equal_steps_a_tie_goes_to_the_smaller_rank() -> None:
    small, big = candidate(0.80, rank=4), candidate(0.82, rank=16)
    winner = choose_winner([big, small], LIMITS)
    assert winner.candidate is small and "preferred for smaller rank" in winner.reason


def test_at_equal_steps_and_rank_a_tie_goes_to_the_higher_identity() -> None:
    lora, dora = candidate(0.80), candidate(0.81, method="dora")
    winner = choose_winner([lora, dora], LIMITS)
    assert winner.candidate is dora
    assert "preferred for the higher identity at equal steps and rank" in winner.reason


def test_a_checkpoint_beyond_a_limit_does_not_win() -> None:
    copycat = candidate(0.99, 800, memorisation=0.9)
    winner = choose_winner([copycat, candidate(0.7)], LIMITS)
    assert winner.candidate.score.identity.value == 0.7
    assert winner.reason.endswith("; 1 of 2 checkpoints fails the guards.")
    assert winner.table[-1].failed_guards == ("memorisation 0.90 is above 0.5",)


def test_when_none_passes_the_nearest_is_named_with_a_warning() -> None:
    one = candidate(0.6, drift=0.5)
    two = candidate(0.9, drift=0.6, fidelity=0.1)
    winner = choose_winner([two, one], LIMITS)
    assert winner.candidate is one and not winner.passed_guards
    assert winner.reason.startswith("No checkpoint passes the guards; the nearest is rank 4 LoRA")
    assert winner.reason.endswith("It fails: drift 0.50 is above 0.4.")


def test_a_likeness_that_is_not_above_the_base_is_called_so() -> None:
    winner = choose_winner([candidate(0.06)], LIMITS)
    assert not winner.above_base
    assert winner.reason.endswith(
        "Its interval is not above the bare base's 0.00 [-0.05, 0.05]: the likeness is not shown."
    )


def test_an_identity_without_scale_is_called_so() -> None:
    reason = choose_winner([candidate(0.3, normalised=False)], LIMITS).reason
    assert "not normalised" in reason


def test_what_tells_trials_apart_is_in_the_reason() -> None:
    found = [replace(candidate(0.9), variant="lr 0.001"), replace(candidate(0.2), variant="lr 1")]
    reason = choose_winner(found, Limits()).reason
    assert "rank 4 LoRA (lr 0.001) at step 200: highest" in reason
    assert "clear of the next (rank 4 LoRA (lr 1) at step 200" in reason


def test_a_limit_itself_passes_and_none_switches_a_guard_off() -> None:
    score = candidate(0.5, drift=0.4, fidelity=0.5, memorisation=0.5).score
    assert failed_guards(score, LIMITS) == ()
    bad = candidate(0.5, drift=2, fidelity=-1, memorisation=1).score
    assert len(failed_guards(bad, LIMITS)) == 3
    off = Limits(prompt_fidelity_min=None, drift_max=None, memorisation_max=None)
    assert failed_guards(bad, off) == ()


def test_scores_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(UserError, match="cannot be compared"):
        choose_winner([candidate(0.5), candidate(0.6, key="other")], LIMITS)
    with pytest.raises(ValueError, match="no scored checkpoint"):
        choose_winner([], LIMITS)


candidates = st.lists(
    st.builds(
        candidate,
        identity=st.floats(-0.2, 1.2),
        step=st.sampled_from([100, 200, 400]),
        rank=st.sampled_from([4, 16]),
        width=st.floats(0, 0.2),
        method=st.sampled_from(["lora", "dora"]),
        drift=st.sampled_from([0.1, 0.9]),
        memorisation=st.sampled_from([0.0, 1.0]),
        trial=st.uuids().map(str),
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(candidates, st.randoms())
def test_the_winner_keeps_the_rules_in_any_order(found: list[Candidate], random) -> None:
    winner = choose_winner(found, LIMITS)
    shuffled = list(found)
    random.shuffle(shuffled)
    again = choose_winner(shuffled, LIMITS)
    assert again.candidate is winner.candidate and again.reason == winner.reason
    assert sorted(map(id, found)) == sorted(id(row.candidate) for row in winner.table)
    assert winner.table[0].candidate is winner.candidate and winner.table[0].tied
    passing = [c for c in found if not failed_guards(c.score, LIMITS)]
    assert winner.passed_guards == bool(passing)
    if passing:
        assert winner.candidate in passing
        highest = max(passing, key=lambda c: c.score.identity.value).score
        for row in winner.table:
            differences = np.subtract(highest.identities, row.candidate.score.identities)
            error = differences.std() / PICTURES**0.5
            if row.tied:
                assert differences.mean() <= 2.6 * error + 1e-9
                assert winner.candidate.step <= row.candidate.step
            elif row.candidate in passing:
                assert differences.mean() >= 1.3 * error

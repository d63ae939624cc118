"""The measures against slow, plain references, and the bounds that they promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from training.scoring import measures
from training.scoring.measures import Interval


def unit(count: int, size: int = 6, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, size))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def mean_cosine(rows: np.ndarray, others: np.ndarray) -> list[float]:
    return [float(np.mean([float(a @ b) for b in others])) for a in rows]


def test_reference_similarity_is_the_mean_cosine() -> None:
    images, references = unit(5, seed=1), unit(3, seed=2)
    assert measures.reference_similarity(images, references) == pytest.approx(
        mean_cosine(images, references)
    )


def test_leave_one_out_leaves_each_reference_out_of_its_own_mean() -> None:
    references = unit(4, seed=3)
    wanted = np.mean(
        [
            np.mean([float(references[i] @ references[j]) for j in range(4) if j != i])
            for i in range(4)
        ]
    )
    assert measures.leave_one_out_similarity(references) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="at least 2"):
        measures.leave_one_out_similarity(references[:1])


def test_prompt_margin_is_own_cosine_minus_the_mean_of_the_others() -> None:
    images, texts, own = unit(4, seed=4), unit(3, seed=5), [0, 2, 1, 2]
    wanted = [
        images[i] @ texts[own[i]] - np.mean([images[i] @ texts[j] for j in range(3) if j != own[i]])
        for i in range(4)
    ]
    assert measures.prompt_margins(images, texts, own) == pytest.approx(wanted)


def test_prompt_margin_ignores_what_moves_all_cosines_alike() -> None:
    texts = np.eye(4)[:3]
    plain = np.array([[0.6, 0.0, 0.0, 0.8]])
    shifted = plain + np.array([[0.1, 0.1, 0.1, 0.0]])
    assert measures.prompt_margins(shifted, texts, [0]) == pytest.approx(
        measures.prompt_margins(plain, texts, [0])
    )


def test_pairwise_interval_is_the_mean_over_different_pairs() -> None:
    images = unit(5, seed=6)
    distances = measures.pairwise_distances(images)
    wanted = np.mean([1 - images[i] @ images[j] for i, j in itertools.combinations(range(5), 2)])
    counts = measures.resample_counts(5, 500, seed=0)
    interval = measures.pairwise_interval(distances, counts)
    assert interval.value == pytest.approx(wanted)
    # Resampled by hand: pairs of one picture with itself are left out.
    by_hand = []
    for row in counts.astype(int):
        drawn = np.repeat(np.arange(5), row)
        pairs = [(i, j) for i, j in itertools.permutations(drawn, 2) if i != j]
        if pairs:
            by_hand.append(np.mean([distances[i, j] for i, j in pairs]))
    low, high = np.percentile(by_hand, [2.5, 97.5])
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_pairwise_interval_of_one_picture_or_of_equal_pictures_is_zero() -> None:
    for count in (1, 3):
        images = np.repeat(unit(1), count, axis=0)
        distances = measures.pairwise_distances(images)
        found = measures.pairwise_interval(distances, measures.resample_counts(count, 100, 0))
        assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-12)


def test_copied_finds_training_pictures_and_spares_new_ones() -> None:
    training = unit(20, size=16, seed=7)
    assert measures.copied(training, training).mean() == 1
    assert measures.copied(unit(50, size=16, seed=8), training).mean() < 0.3
    with pytest.raises(ValueError, match="at least 2"):
        measures.copied(training, training[:1])


def test_one_pair_of_duplicates_in_the_set_does_not_hide_copies() -> None:
    training = unit(21, size=16, seed=9)
    training[1] = training[0]
    assert measures.copied(training[2:], training).mean() == 1


def test_mean_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(10).normal(size=21)
    counts = measures.resample_counts(len(values), 20_000, seed=1)
    found = measures.mean_interval(values, counts)
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", random_state=2
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.02)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(11)
    hits = 0
    for trial in range(400):
        values = generator.normal(size=21)
        found = measures.mean_interval(values, measures.resample_counts(21, 400, trial))
        hits += found.low <= 0 <= found.high
    # The percentile bootstrap of 21 values is known to be a little too narrow.
    assert 0.89 <= hits / 400 <= 0.98


def test_resamples_depend_on_the_seed_alone() -> None:
    assert np.array_equal(measures.resample_counts(7, 50, 3), measures.resample_counts(7, 50, 3))
    assert not np.array_equal(
        measures.resample_counts(7, 50, 3), measures.resample_counts(7, 50, 4)
    )


finite = st.floats(-10, 10)


@given(st.lists(finite, min_size=1, max_size=30), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_an_interval_is_ordered_and_inside_the_values(values: list[float], seed: int) -> None:
    array = np.array(values)
    found = measures.mean_interval(array, measures.resample_counts(len(array), 100, seed))
    assert array.min() - 1e-9 <= found.low <= found.high <= array.max() + 1e-9
    assert found.value == pytest.approx(array.mean())


@given(st.integers(2, 12), st.integers(2, 8), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_measures_stay_in_their_range_and_ignore_the_order(
    count: int, size: int, seed: int
) -> None:
    images, training = unit(count, size, seed), unit(count, size, seed + 1)
    order = np.random.default_rng(seed).permutation(count)
    for measure in (
        lambda rows: measures.reference_similarity(rows, training),
        lambda rows: measures.copied(rows, training),
    ):
        assert np.allclose(measure(images)[order], measure(images[order]))
    assert np.all(np.abs(measures.reference_similarity(images, training)) <= 1 + 1e-9)
    assert -1 - 1e-9 <= measures.leave_one_out_similarity(training) <= 1 + 1e-9
    assert np.allclose(measures.paired_distances(images, images), 0)


@settings(deadline=None)
@given(finite, finite, finite, st.floats(0.1, 5), finite)
def test_scaling_an_interval_keeps_its_order(
    a: float, b: float, c: float, factor: float, offset: float
) -> None:
    low, value, high = sorted((a, b, c))
    scaled = Interval(value=value, low=low, high=high).scaled(factor, offset)
    assert scaled.low <= scaled.value <= scaled.high
    assert scaled.value == pytest.approx(value * factor + offset)


def test_a_constant_lead_is_told_apart_however_far_pictures_scatter() -> None:
    rng = np.random.default_rng(0)
    values, counts = rng.normal(size=24), measures.resample_counts(24, 500, 0)
    assert measures.tells_apart(values + 0.01, values, counts)
    assert not measures.tells_apart(values, values, counts)
    assert not measures.tells_apart(values, values + 0.01, counts)
    assert not measures.tells_apart(rng.normal(size=24) + 0.01, values, counts)


@pytest.mark.parametrize(
    "rows",
    [np.zeros((0, 3)), np.ones(3), np.ones((2, 3)), np.full((2, 3), np.nan), np.zeros((1, 3))],
)
def test_rows_that_are_no_unit_vectors_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image embeddings"):
        measures.unit_rows(rows, "image embeddings")

"""Views per image: the conversions that guides get wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import Recipe, steps_for_views, views_per_image


def test_published_schedules_come_to_the_published_views() -> None:
    assert views_per_image(228, Recipe(batch_size=4), 76) == 12
    assert views_per_image(450, Recipe(batch_size=4), 20) == 90
    assert views_per_image(450, Recipe(batch_size=1), 20) == 22.5
    assert round(views_per_image(1750, Recipe(batch_size=1), 28)) == 62


def test_accumulation_and_workers_count_as_batch() -> None:
    assert views_per_image(10, Recipe(batch_size=2, accumulation=3), 12, workers=2) == 10


@given(
    views=st.integers(1, 200),
    pictures=st.integers(1, 500),
    batch=st.integers(1, 64),
    workers=st.integers(1, 8),
)
def test_the_steps_for_some_views_are_the_fewest_that_reach_them(
    views: int, pictures: int, batch: int, workers: int
) -> None:
    recipe = Recipe(batch_size=batch)
    steps = steps_for_views(views, recipe, pictures, workers)
    assert views_per_image(steps, recipe, pictures, workers) >= views
    assert views_per_image(steps - 1, recipe, pictures, workers) < views


def test_no_pictures_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        views_per_image(1, Recipe(), 0)

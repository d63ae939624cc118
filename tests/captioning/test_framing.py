"""Framing and direction from tags: which word wins, and when nothing can be said."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning import STARTER_TAGGER, direction_of, framing_of, side_unsigned

WORDS = ("close-up", "portrait", "upper body", "full body", "from side", "profile", "facing left")
WORDS += ("facing right", "from behind", "looking at viewer", "looking left", "smile")
SCORES = st.floats(0.05, 1.0)
NAMES = st.sampled_from(list(WORDS))


@pytest.mark.parametrize(
    ("tags", "framing"),
    [
        ({"close-up": 0.9}, "close-up"),
        ({"portrait": 0.9}, "close-up"),
        ({"upper_body": 0.9}, "upper"),
        ({"cowboy shot": 0.9}, "upper"),
        ({"full body": 0.9}, "full"),
        ({"upper body": 0.5, "full body": 0.8}, "full"),
        ({"upper body": 0.7, "full body": 0.7}, "upper"),
        ({"full body": 0.34}, None),
        ({"smile": 0.9}, None),
        ({}, None),
    ],
)
def test_the_best_accepted_framing_wins(tags: dict[str, float], framing: str | None) -> None:
    assert framing_of(tags) == framing


@pytest.mark.parametrize(
    ("tags", "direction"),
    [
        ({"straight-on": 0.9}, "front"),
        ({"looking at viewer": 0.9}, "front"),
        ({"profile": 0.9, "facing left": 0.8}, "left"),
        ({"from_side": 0.9, "looking_to_the_right": 0.8}, "right"),
        ({"from behind": 0.9, "looking at viewer": 0.95}, "back"),
        ({"profile": 0.9}, None),
        ({"profile": 0.9, "looking at viewer": 0.9}, None),
        ({"smile": 0.9}, None),
    ],
)
def test_the_direction_is_signed_where_tags_allow(
    tags: dict[str, float], direction: str | None
) -> None:
    assert direction_of(tags) == direction


def test_a_profile_without_a_side_is_told_apart_from_no_sign_at_all() -> None:
    assert side_unsigned({"profile": 0.9})
    assert not side_unsigned({"profile": 0.9, "facing left": 0.8})
    assert not side_unsigned({"smile": 0.9})


def test_every_framing_word_of_the_starter_tagger_is_known() -> None:
    with (STARTER_TAGGER / "selected_tags.csv").open(newline="") as file:
        names = {row["name"] for row in csv.DictReader(file)}
    words = {"close-up": "close-up", "portrait": "close-up", "far_view": "full"}
    assert words.keys() <= names
    assert {word: framing_of({word: 1.0}) for word in words} == words


@given(st.dictionaries(NAMES, SCORES))
def test_the_order_of_the_tags_decides_nothing(tags: dict[str, float]) -> None:
    turned = dict(reversed(tags.items()))
    assert framing_of(tags) == framing_of(turned)
    assert direction_of(tags) == direction_of(turned)

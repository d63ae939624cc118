"""The holdout covers the framings, is the same every time, and hardly moves when pictures come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.holdout import draw_holdout

FRAMING = st.sampled_from(["close-up", "upper", "full", None])
FRAMINGS = st.lists(FRAMING, min_size=1, max_size=60).map(
    lambda found: {f"{place:064x}": framing for place, framing in enumerate(found)}
)


def held_of(framings, share=0.2, seed=0):
    return [framings[one] for one in draw_holdout(framings, share, seed)]


def test_each_framing_is_held_out_even_a_rare_one():
    framings = {f"{n:064x}": "close-up" for n in range(40)}
    framings |= {"a" * 64: "full", "b" * 64: "full", "c" * 64: "upper", "d" * 64: "upper"}
    held = held_of(framings)
    assert len(held) == 9
    assert (held.count("full"), held.count("upper"), held.count("close-up")) == (1, 1, 7)


def test_places_go_by_size():
    names = ["close-up"] * 30 + ["upper"] * 20 + ["full"] * 10
    held = held_of({f"{n:064x}": framing for n, framing in enumerate(names)})
    assert [held.count(one) for one in ("close-up", "upper", "full")] == [6, 4, 2]


def test_the_only_picture_of_a_framing_is_trained_on():
    framings = {f"{n:064x}": "close-up" for n in range(9)} | {"a" * 64: "full"}
    assert held_of(framings) == ["close-up", "close-up"]


@pytest.mark.parametrize("count", [1, 4])
def test_few_pictures_have_none(count: int):
    assert not held_of({f"{n:064x}": None for n in range(count)}, 0.5)


@given(framings=FRAMINGS, share=st.floats(0, 0.5), seed=st.integers(0, 3))
def test_the_share_is_kept_and_order_does_not_matter(framings, share: float, seed: int):
    held = draw_holdout(framings, share, seed)
    backwards = dict(reversed(framings.items()))
    assert held == draw_holdout(backwards, share, seed)
    if len(framings) >= 5 and share > 0:
        assert len(held) == max(1, round(share * len(framings)))
        sizes = {one: list(framings.values()).count(one) for one in set(framings.values())}
        rich = {one for one, size in sizes.items() if size > 1}
        if len(held) >= len(rich):
            assert rich <= {framings[one] for one in held}
    else:
        assert not held


@given(framings=FRAMINGS, new=FRAMING, share=st.floats(0.05, 0.4))
def test_one_more_picture_moves_few(framings, new, share: float):
    before = draw_holdout(framings, share, 0)
    after = draw_holdout(framings | {"f" * 64: new}, share, 0)
    if len(framings) >= 5:
        assert len(before - after) <= 2

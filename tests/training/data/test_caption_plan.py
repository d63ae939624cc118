from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from training.data.captions import CaptionPlan, tag_orders, without_trigger
from training.recipe import Recipe

tag = st.text(st.characters(codec="ascii", exclude_characters=","), min_size=1, max_size=6)


def test_the_written_order_comes_first_and_kept_tags_never_move() -> None:
    caption = "zkw, person, red hat, smile, blue shirt, portrait"
    orders = tag_orders(caption, 8, kept=2)
    assert orders[0] == caption and len(set(orders)) > 4
    assert all(order.startswith("zkw, person, ") for order in orders)
    assert orders == tag_orders(caption, 8, kept=2)
    assert orders[:3] == tag_orders(caption, 3, kept=2)  # more orders change none


@given(tags=st.lists(tag.map(str.strip).filter(bool), max_size=8), kept=st.integers(0, 10))
def test_an_order_has_the_same_tags(tags: list[str], kept: int) -> None:
    for order in tag_orders(", ".join(tags), 4, kept):
        found = order.split(", ") if order else []
        assert sorted(found) == sorted(tags)
        assert found[:kept] == tags[:kept]


def test_the_trigger_goes_wherever_it_stands() -> None:
    assert without_trigger("zkw, person, red hat", "zkw") == "person, red hat"
    assert without_trigger("zkw person, a photo of zkw, zkws hat", "zkw") == (
        "person, a photo of, zkws hat"
    )
    assert without_trigger("zkw", "zkw") == ""


def test_kept_tags_matter_only_with_several_orders() -> None:
    assert CaptionPlan.of(Recipe(kept_tags=5)) == CaptionPlan.of(Recipe()) == CaptionPlan()
    assert Recipe(kept_tags=5).canonical() == Recipe().canonical()
    assert CaptionPlan.of(Recipe(tag_orders=3, prior_weight=1.0)) == CaptionPlan(3, 2, True)
    preserving = Recipe(prior_weight=1.0, class_pictures="people")
    assert CaptionPlan.of(preserving) == CaptionPlan()

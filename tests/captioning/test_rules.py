import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning import Rules, UserError, intrinsic_tags, parse_config, render

words = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["smile", "Smile", "ayatok", "woman", "a,b", " ", "blue  sky", "line\nbreak"]
)
scores = st.dictionaries(words, st.floats(0, 1), max_size=8)
rule_sets = st.builds(
    Rules,
    threshold=st.floats(0.05, 1),
    form=st.sampled_from(["tags", "prose", "tags+prose"]),
    drop=st.lists(words, max_size=3).map(tuple),
    max_tags=st.integers(1, 5),
    intrinsic=st.sampled_from(["keep", "prune"]),
)


def caption(tags: dict[str, float], prose: str = "", intrinsic=frozenset(), **rules) -> str:
    return render("ayatok", "woman", tags, prose, intrinsic, Rules(**rules))


def test_trigger_class_word_then_tags_by_score_then_name():
    tags = {"smile": 0.6, "blue sky": 0.9, "arm up": 0.6, "faint": 0.2}
    assert caption(tags) == "ayatok, woman, blue sky, arm up, smile"


def test_form_chooses_tags_prose_or_both():
    tags, prose = {"smile": 0.9}, " A woman\nsmiles. "
    assert caption(tags, prose, form="tags") == "ayatok, woman, smile"
    assert caption(tags, prose, form="prose") == "ayatok, woman, A woman smiles"
    assert caption(tags, prose, form="tags+prose") == "ayatok, woman, smile, A woman smiles"


def test_dropped_intrinsic_and_surplus_tags_stay_out():
    tags = {"watermark": 0.99, "red hair": 0.9, "smile": 0.8, "hat": 0.7, "tree": 0.6}
    text = caption(tags, intrinsic=frozenset({"red hair"}), drop=("Watermark",), max_tags=2)
    assert text == "ayatok, woman, smile, hat"


def test_threshold_counts_itself():
    assert caption({"a": 0.5, "b": 0.4999}, threshold=0.5) == "ayatok, woman, a"


def test_a_tag_on_nearly_all_pictures_is_intrinsic():
    pictures = [{"red hair": 0.9, "smile": 0.9 if row < 16 else 0.0} for row in range(20)]
    pictures[0]["red hair"] = 0.1  # hidden once: 95 % is still nearly all
    assert intrinsic_tags(pictures, Rules()) == {"red hair"}
    assert intrinsic_tags(pictures, Rules(intrinsic_share=0.8)) == {"red hair", "smile"}
    assert intrinsic_tags(pictures, Rules(intrinsic="keep")) == frozenset()


def test_three_pictures_prove_nothing():
    assert intrinsic_tags([{"red hair": 0.9}] * 3, Rules()) == frozenset()
    assert intrinsic_tags([{"red hair": 0.9}] * 4, Rules()) == {"red hair"}
    assert intrinsic_tags([], Rules()) == frozenset()


@given(tags=scores, prose=words, rules=rule_sets, intrinsic=st.frozensets(words, max_size=3))
def test_a_caption_is_one_clean_line(tags, prose, rules, intrinsic):
    text = render("ayatok", "woman", tags, prose, intrinsic, rules)
    assert text == render("ayatok", "woman", dict(reversed(tags.items())), prose, intrinsic, rules)
    assert text.splitlines() == [text]
    assert text.startswith("ayatok, woman")
    if rules.form == "tags":
        parts = text.split(", ")
        assert all(part == " ".join(part.split()) and part for part in parts)
        assert len({part.casefold() for part in parts}) == len(parts)
        assert len(parts) <= 2 + rules.max_tags


@given(tags=scores, low=st.floats(0.05, 1), high=st.floats(0.05, 1))
def test_a_higher_threshold_never_adds_a_tag(tags, low, high):
    low, high = sorted((low, high))
    many = caption(tags, threshold=low, max_tags=200).split(", ")
    few = caption(tags, threshold=high, max_tags=200).split(", ")
    assert set(few) <= set(many)


@given(pictures=st.lists(scores, max_size=6), rules=rule_sets)
def test_intrinsic_tags_do_not_depend_on_order(pictures, rules):
    assert intrinsic_tags(pictures, rules) == intrinsic_tags(pictures[::-1], rules)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"treshold": 0.4}, "did you mean 'threshold'"),
        ({"threshold": 0.01}, "threshold: 0.01"),
        ({"form": "haiku"}, "form: 'haiku'"),
        ({"intrinsic_share": 0.3}, "intrinsic_share: 0.3"),
    ],
)
def test_wrong_rules_are_named(data, problem):
    with pytest.raises(UserError, match=problem):
        parse_config(Rules, data, "character.yaml")

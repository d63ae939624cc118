import datetime
import pickle
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from captioning import UserError, load_config, parse_config


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Network(Strict):
    rank: int = Field(16, ge=1, le=256)


class Recipe(Strict):
    network: Network = Network()
    lr: float = 1e-4


class Search(Strict):
    recipes: list[Recipe] = []
    by_name: dict[str, Recipe] | None = None
    base: str


def test_a_good_file_is_read_and_an_empty_one_means_defaults(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text("network: {rank: 4}\n")
    assert load_config(Recipe, file).network.rank == 4
    file.write_text("")
    assert load_config(Recipe, file) == Recipe()
    file.write_text('{"lr": 0.5}')
    assert load_config(Recipe, file).lr == 0.5


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"base": "x", "bse": 1}, "bse"),
        ({"base": "x", "recipes": [{"network": {"rnak": 4}}]}, "recipes.0.network.rnak"),
        ({"base": "x", "by_name": {"a": {"network": {"rnk": 4}}}}, "by_name.a.network.rnk"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(data: object, where: str):
    with pytest.raises(UserError) as caught:
        parse_config(Search, data, "sweep.yaml")
    meant = "base" if where == "bse" else "rank"
    assert f"sweep.yaml: {where}: unknown key; did you mean '{meant}'?" in str(caught.value)


def test_an_unknown_key_like_no_other_gets_the_list():
    with pytest.raises(UserError, match="use one of: lr, network"):
        parse_config(Recipe, {"colour": 1}, "r.yaml")


class Red(Strict):
    type: Literal["red"]
    shade: float = 0.5


class Blue(Strict):
    type: Literal["blue"]
    depth: float = 0.5


class Paint(Strict):
    colour: Annotated[Red | Blue, Field(discriminator="type")]
    more: list[Annotated[Red | Blue, Field(discriminator="type")]] = []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"colour": {"type": "red", "depth": 1}}, "colour.depth: unknown key"),
        ({"colour": {"type": "red", "shaed": 1}}, "colour.shaed: unknown key; did you mean 'sha"),
        ({"colour": {"type": "blue", "depth": "x"}}, "colour.depth: 'x'"),
        (
            {"colour": {"type": "red"}, "more": [{"type": "blue", "dpth": 1}]},
            "more.0.dpth: unknown key; did you mean 'depth'",
        ),
    ],
)
def test_a_union_is_answered_by_the_model_that_its_tag_names(data: object, said: str):
    with pytest.raises(UserError) as caught:
        parse_config(Paint, data, "p.yaml")
    assert f"p.yaml: {said}" in str(caught.value)
    assert ("shade" in str(caught.value)) != ("blue" in str(data))


def test_every_problem_is_named_with_its_value():
    with pytest.raises(UserError) as caught:
        parse_config(Recipe, {"network": {"rank": 0}, "lr": "fast"}, "r.yaml")
    assert "network.rank: 0: Input should be greater than or equal to 1" in caught.value.found
    assert "lr: 'fast'" in caught.value.found


def test_a_missing_key_and_a_huge_value_make_short_messages():
    with pytest.raises(UserError, match="base: nothing: Field required"):
        parse_config(Search, {}, "s.yaml")
    with pytest.raises(UserError) as caught:
        parse_config(Recipe, ["x" * 10_000], "r.yaml")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\t- x", "when: 2001-99-99", "[" * 1200])
def test_text_that_is_no_yaml_is_named(tmp_path: Path, text: str):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml: not valid YAML"):
        load_config(Recipe, file)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    for path in (tmp_path, tmp_path / "nowhere.yaml", tmp_path / "nowhere.yaml" / "x"):
        with pytest.raises(UserError, match="no readable YAML file"):
            load_config(Recipe, path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(UserError, match="no readable YAML file"):
        load_config(Recipe, tmp_path / "latin.yaml")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.just(datetime.date.min),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["base", "recipes", "by_name", "network", "rank", "x"])
            | st.integers()
            | st.none(),
            inner,
            max_size=3,
        )
    ),
)


@given(data=plain)
def test_any_data_is_a_config_or_a_user_error(data: object):
    try:
        parse_config(Search, data, "s.yaml")
    except UserError as error:
        assert str(error).startswith("s.yaml: ")
        assert error.fix


def test_a_user_error_survives_pickling():
    error = pickle.loads(pickle.dumps(UserError("a.yaml: b", "0", "give 1")))
    assert str(error) == "a.yaml: b: 0. Fix: give 1"
    assert (error.where, error.found, error.fix) == ("a.yaml: b", "0", "give 1")

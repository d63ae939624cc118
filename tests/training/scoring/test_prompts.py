"""The scoring config and the pictures that it asks for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning import UserError, parse_config
from training.scoring.prompts import (
    ScoringConfig,
    class_word_prompts,
    images_per_batch,
    plan_cells,
)


def test_the_default_asks_for_34_pictures() -> None:
    config = ScoringConfig()
    cells = plan_cells(config, "zkw", "person")
    assert len(cells) == config.images_per_checkpoint() == 34


def test_the_subject_is_trigger_and_class_word_and_controls_lack_the_trigger() -> None:
    cells = plan_cells(ScoringConfig(), "zkw", "person")
    for cell in cells:
        assert ("zkw, person" in cell.prompt) == (cell.kind == "subject")
        assert ("person" in cell.prompt) == (cell.kind != "unrelated")
    assert all("zkw" not in prompt for prompt in class_word_prompts(ScoringConfig(), "person"))


def test_class_word_pictures_share_the_noise_of_the_character_and_nothing_else_does() -> None:
    cells = plan_cells(ScoringConfig(control_seeds=2), "zkw", "person")
    seeds = {(c.kind, c.prompt_index, c.seed_index): c.seed for c in cells}
    for (kind, prompt, number), seed in seeds.items():
        if kind == "class_word":
            assert seed == seeds["subject", prompt, number]
    own = [c.seed for c in cells if c.kind != "class_word"]
    assert len(set(own)) == len(own)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_cells_have_their_own_names_and_are_as_many_as_promised(
    prompts: int, seeds: int, control_seeds: int
) -> None:
    config = ScoringConfig(
        prompts=tuple(f"{{subject}}, {n}" for n in range(prompts + 1)),
        unrelated=tuple(f"thing {n}" for n in range(prompts)),
        seeds=seeds,
        control_seeds=control_seeds,
    )
    cells = plan_cells(config, "zkw", "person")
    assert len({cell.name for cell in cells}) == len(cells) == config.images_per_checkpoint()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompts": ["a person", "{subject}, smile"]}, "must contain {subject}"),
        ({"prompts": ["{subject}"]}, "at least 2"),
        ({"prompts": ["{subject}", "{subject}"]}, "equal"),
        ({"unrelated": ["{subject} in a car"]}, "must not contain"),
        ({"seed": 3}, "seeds"),
        ({"seeds": 0}, "seeds"),
        ({"guidance": 0.5}, "guidance"),
        ({"limits": {"drift_maximum": 1}}, "drift_max"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(data: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(ScoringConfig, data, "sweep.yaml")
    assert message in str(caught.value)


def test_batches_shrink_with_the_size_and_never_vanish() -> None:
    assert images_per_batch(64) >= 34
    assert images_per_batch(512) == 8
    assert images_per_batch(4096) == 1

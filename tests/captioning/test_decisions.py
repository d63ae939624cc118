"""Decisions and overrides: nothing is deleted, everything is signed, and blocks hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from captioning_examples import Answers

from captioning import (
    Character,
    Decision,
    Finding,
    Override,
    Store,
    UserError,
    blocking,
    caption_all,
    decide,
    find_image,
    freeze,
    kept_images,
    load_images,
    load_overrides,
    observe,
    override,
    require_passable,
    take_in,
)


@pytest.fixture
def taken_in(store: Store, aya: Character, pictures: Path) -> Store:
    take_in(pictures, store, aya)
    return store


def test_a_dropped_picture_is_left_out_with_its_reason_and_comes_back(
    taken_in: Store, aya: Character
) -> None:
    store = taken_in
    image = find_image(store, "aya", "3.png")
    decide(store, "aya", [Decision(image=image.sha256, keep=False, reason="two people")])
    assert "3.png" not in [kept.source for kept in kept_images(store, "aya")]
    assert len(load_images(store, "aya")) == 6
    observe(kept_images(store, "aya"), store, Answers())
    assert image.sha256 not in caption_all(store, aya)
    version = freeze(store, aya)
    assert len(version.train) + len(version.holdout) == 5
    (row,) = map(json.loads, (version.path / "rejected.jsonl").read_text().splitlines())
    assert row["source"] == "3.png" and row["reason"] == "two people" and row["by"]
    decide(store, "aya", [Decision(image=image.sha256, keep=True)])
    assert len(kept_images(store, "aya")) == 6


def test_a_picture_is_found_by_name_or_digits_and_a_wrong_name_gets_the_nearest(
    taken_in: Store,
) -> None:
    image = find_image(taken_in, "aya", "2.png")
    assert find_image(taken_in, "aya", image.sha256[:8]) == image
    with pytest.raises(UserError, match="did you mean"):
        find_image(taken_in, "aya", "2.pmg")
    with pytest.raises(UserError, match="no picture"):
        find_image(taken_in, "aya", image.sha256[:7])


def test_deciding_about_a_foreign_picture_is_refused_and_writes_nothing(taken_in: Store) -> None:
    mine = find_image(taken_in, "aya", "1.png")
    with pytest.raises(UserError, match="no picture"):
        decide(
            taken_in,
            "aya",
            [Decision(image=mine.sha256, keep=False), Decision(image="0" * 64, keep=False)],
        )
    assert len(kept_images(taken_in, "aya")) == 6


def test_a_block_holds_until_it_is_overridden_by_name(taken_in: Store) -> None:
    image = find_image(taken_in, "aya", "1.png")
    findings = [
        Finding(code="CAP101", severity="block", where=image.sha256, message="no trigger"),
        Finding(code="CAP999", severity="warn", where="dataset", message="only a warning"),
    ]
    with pytest.raises(UserError, match=r"CAP101 1\.png: no trigger"):
        require_passable(taken_in, "aya", findings, [])
    assert blocking(findings, [Override(code="CAP101", where="0" * 64)]) == findings[:1]
    override(taken_in, "aya", Override(code="CAP101", where=image.sha256, reason="on purpose"))
    accepted = load_overrides(taken_in, "aya")
    require_passable(taken_in, "aya", findings, accepted)
    assert accepted[0].by and accepted[0].reason == "on purpose"
    assert not blocking(findings, [Override(code="CAP101")])

"""Captions from the store: the newest word of the models, the gate before a version, overrides."""

import json
from pathlib import Path

import pytest
from captioning_examples import Answers

from captioning import (
    Character,
    Edit,
    Observation,
    Override,
    Rules,
    Store,
    UserError,
    caption_all,
    caption_findings,
    freeze,
    load_captions,
    load_images,
    load_seen,
    observe,
    override,
    record_edits,
    take_in,
)


@pytest.fixture
def captioned(store: Store, aya: Character, pictures: Path) -> Character:
    take_in(pictures, store, aya)
    observe(load_images(store, "aya"), store, Answers())
    caption_all(store, aya)
    return aya


def test_two_runs_give_the_same_bytes(store: Store, captioned: Character):
    file = store.characters / "aya" / "captions.jsonl"
    first = file.read_bytes()
    caption_all(store, captioned)
    assert file.read_bytes() == first


class Categories(Answers):
    """A tagger that says which of its tags name known characters."""

    def models(self):
        return {"tags": ("wd-swinv2-tagger-v3", "r1")}

    def ask(self, requests):
        for sha256, kind, _ in requests:
            yield Observation(
                image=sha256,
                kind=kind,
                model="wd-swinv2-tagger-v3",
                revision="r1",
                milliseconds=1,
                tags={"hatsune miku": 0.99, "red coat": 0.3},
                categories={"hatsune miku": 4},
            )


def test_names_of_known_characters_and_the_taggers_threshold_come_from_the_observation(
    store: Store, aya: Character, pictures: Path
):
    take_in(pictures, store, aya)
    observe(load_images(store, "aya"), store, Categories())
    kept = aya.model_copy(update={"rules": Rules(intrinsic="keep")})
    assert set(caption_all(store, kept).values()) == {"ayatok, woman, red coat"}
    (seen, *_) = load_seen(store, kept).values()
    assert (seen.tagger, seen.characters) == ("wd-swinv2-tagger-v3", {"hatsune miku"})


def edit(store: Store, **change) -> str:
    image = load_images(store, "aya")[0].sha256
    record_edits(store, "aya", [Edit(image=image, **change)])
    return image


def test_a_block_stops_freezing_until_it_is_mended_or_overridden(
    store: Store, captioned: Character
):
    image = edit(store, action="add", value="红色外套")
    (found,) = [one for one in caption_findings(store, captioned) if one.severity == "block"]
    assert (found.code, found.where) == ("CAP113", image)
    with pytest.raises(UserError, match=r"CAP113 1\.png: 4 letters that are not Latin"):
        freeze(store, captioned)
    override(store, "aya", Override(code="CAP113", where=image, reason="the logo says so"))
    version = freeze(store, captioned)
    manifest = json.loads((version.path / "manifest.json").read_text())
    assert manifest["findings"]["CAP113"] == 1
    assert manifest["overrides"][0]["reason"] == "the logo says so"
    edit(store, action="leave", value="红色外套")
    assert not [one for one in caption_findings(store, captioned) if one.severity == "block"]


def test_what_is_frozen_is_what_the_rules_and_edits_say_now(store: Store, captioned: Character):
    image = edit(store, action="add", value="red scarf")
    assert "red scarf" not in load_captions(store, "aya")[image]
    version = freeze(store, captioned)
    texts = {one.sha256: one.caption for one in (*version.train, *version.holdout)}
    assert "red scarf" in texts[image]
    assert load_captions(store, "aya") == texts

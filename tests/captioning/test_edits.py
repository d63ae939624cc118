"""Human edits: signed rows that add up, and outlive captioning again."""

import json
from pathlib import Path

import pytest
from captioning_examples import Answers

from captioning import (
    Character,
    Edit,
    Observation,
    Store,
    UserError,
    caption_all,
    caption_changes,
    corrections,
    load_edits,
    load_images,
    observe,
    record_edits,
    take_in,
)


@pytest.fixture
def image(store: Store, aya: Character, pictures: Path) -> str:
    """The sha256 of 1.png, observed like the five others."""
    take_in(pictures, store, aya)
    observe(load_images(store, "aya"), store, Answers())
    return load_images(store, "aya")[0].sha256


def added_up(*edits: tuple[str, str]):
    rows = [Edit(image="x", action=action, value=value) for action, value in edits]
    return corrections(rows)["x"]


def test_the_newest_edit_about_a_tag_holds():
    assert added_up(("add", "Blue_Hat"), ("add", "scarf")).added == ("blue hat", "scarf")
    both = added_up(("add", "hat"), ("remove", "HAT"))
    assert (both.added, both.removed) == ((), {"hat"})
    assert added_up(("remove", "hat"), ("leave", "hat")).removed == frozenset()
    assert added_up(("prose", "one"), ("prose", "two\nlines")).prose == "two lines"
    assert added_up(("caption", "mine"), ("caption", "")).caption is None


def test_an_edit_must_name_a_tag():
    with pytest.raises(ValueError, match="is no tag"):
        Edit(image="x", action="add", value=" , ")


def test_edits_are_signed_dated_and_only_ever_added(store: Store, image: str):
    record_edits(store, "aya", [Edit(image=image, action="add", value="hat", before="a")])
    record_edits(store, "aya", [Edit(image=image, action="remove", value="hat", by="mo")])
    first, second = load_edits(store, "aya")
    assert first.by and second.by == "mo" and first.at.endswith("+00:00")
    assert (first.before, first.value) == ("a", "hat")
    rows = (store.characters / "aya" / "edits.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["action"] == "add"


def test_an_edit_of_a_foreign_picture_is_refused_and_writes_nothing(store: Store, image: str):
    good, bad = (Edit(image=one, action="add", value="hat") for one in (image, "0" * 64))
    with pytest.raises(UserError, match="no picture"):
        record_edits(store, "aya", [good, bad])
    assert load_edits(store, "aya") == []


class Newer(Answers):
    """A second tagger: it sees a hat everywhere, and no smile."""

    def models(self):
        return {"tags": ("newer", "r1")}

    def ask(self, requests):
        for sha256, kind, _ in requests:
            yield Observation(
                image=sha256,
                kind=kind,
                model="newer",
                revision="r1",
                milliseconds=1,
                tags={"hat": 0.9, "tree": 0.6} if sha256 == self.only else {"tree": 0.6},
            )


def test_captioning_again_keeps_edits_and_another_model_shows_what_it_changes(
    store: Store, aya: Character, image: str
):
    changes = [("add", "hat"), ("remove", "smile"), ("add", "red scarf")]
    record_edits(store, "aya", [Edit(image=image, action=a, value=v) for a, v in changes])
    before = caption_all(store, aya)
    assert before[image] == f"ayatok, woman, red scarf, hat, tag {image[:4]}"
    assert caption_all(store, aya) == before and caption_changes(store, aya) == []
    newer = Newer()
    newer.only = image
    observe(load_images(store, "aya"), store, newer)
    found = {change.image: change for change in caption_changes(store, aya)}
    assert len(found) == 6
    mine = found[image]
    assert mine.before == before[image]
    assert mine.after == "ayatok, woman, red scarf, hat, tree"
    assert (mine.came, mine.went) == (("tree",), (f"tag {image[:4]}",))
    assert mine.moot == ("hat", "smile")  # the new model says what the person had said
    other = next(change for sha256, change in found.items() if sha256 != image)
    assert other.went[0] == "smile" and other.moot == ()


def test_prose_by_hand_takes_the_place_of_the_models(store: Store, aya: Character, image: str):
    prose = aya.model_copy(update={"rules": aya.rules.model_copy(update={"form": "prose"})})
    record_edits(store, "aya", [Edit(image=image, action="prose", value="She waves.")])
    assert caption_all(store, prose)[image] == "ayatok, woman, She waves"
    record_edits(store, "aya", [Edit(image=image, action="prose", value="")])
    assert caption_all(store, prose)[image] == f"ayatok, woman, a picture of {image[:4]}"

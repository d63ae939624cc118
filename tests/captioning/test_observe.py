"""Observing and captioning with a client that needs no model."""

import errno
import os
import random
from pathlib import Path

import pytest
from captioning_examples import Answers

from captioning import (
    Character,
    Rules,
    Store,
    UserError,
    caption_all,
    load_captions,
    load_images,
    load_observations,
    observe,
    take_in,
)


def stored(store: Store) -> list[Path]:
    return sorted(store.observations.rglob("*.json"))


def test_every_answer_is_stored_by_image_model_and_revision(
    pictures: Path, store: Store, aya: Character
):
    images = list(take_in(pictures, store, aya).images)
    seen: list[tuple[int, int]] = []
    observe(images, store, Answers(), lambda done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(13)]
    assert len(stored(store)) == 12
    assert (store.observations / images[0].sha256 / "tagger@r1.json").exists()
    said = load_observations(store, images[0].sha256)
    prose, tags = sorted(said, key=lambda one: one.kind)  # several threads write: no order in a run
    assert tags.tags is not None and tags.tags["faint"] == 0.1 and tags.prose is None
    assert prose.prose == f"a picture of {images[0].sha256[:4]}."


def test_a_second_run_asks_for_nothing(pictures: Path, store: Store, aya: Character):
    images = list(take_in(pictures, store, aya).images)
    observe(images, store, Answers())
    again = Answers()
    seen: list[tuple[int, int]] = []
    observe(images, store, again, lambda done, total: seen.append((done, total)))
    assert again.asked == []
    assert seen == [(12, 12)]


def test_after_ctrl_c_only_what_is_missing_is_asked_for(
    pictures: Path, store: Store, aya: Character
):
    images = list(take_in(pictures, store, aya).images)
    first = Answers(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        observe(images, store, first)
    kept = {path: path.read_bytes() for path in stored(store)}
    assert len(kept) == 5
    second = Answers()
    observe(images, store, second)
    assert len(second.asked) == 7
    assert not set(first.asked) & set(second.asked)
    assert len(stored(store)) == 12
    assert all(path.read_bytes() == data for path, data in kept.items())


def test_a_full_disk_keeps_what_was_stored_and_leaves_no_torn_file(
    pictures: Path, store: Store, aya: Character, monkeypatch: pytest.MonkeyPatch
):
    images = list(take_in(pictures, store, aya).images)
    real, calls = os.replace, []

    def no_space(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        observe(images, store, Answers())
    monkeypatch.undo()
    everything = [path for path in store.observations.rglob("*") if path.is_file()]
    kept = len(stored(store))
    assert len(everything) == kept and 3 <= kept < 12
    again = Answers()
    observe(images, store, again)
    assert len(again.asked) == 12 - kept


def test_a_picture_that_fails_costs_no_other_and_is_asked_again(
    pictures: Path, store: Store, aya: Character
):
    images = list(take_in(pictures, store, aya).images)
    bad = images[2].sha256
    with pytest.raises(UserError, match=r"1 of 6 pictures failed: 3\.png \(tagger: RuntimeError"):
        observe(images, store, Answers(failing=frozenset({bad})))
    assert [seen.error for seen in load_observations(store, bad)] == ["RuntimeError: no answer"] * 2
    with pytest.raises(UserError, match=r"no tags for 3\.png yet"):
        caption_all(store, aya)
    again = Answers()
    observe(images, store, again)
    assert again.asked == [(bad, "tags"), (bad, "prose")]
    assert len(caption_all(store, aya)) == 6


def test_a_lost_or_spoiled_blob_is_named(pictures: Path, store: Store, aya: Character):
    images = list(take_in(pictures, store, aya).images)
    store.blobs.path(images[0].sha256).write_bytes(b"rotten")
    with pytest.raises(UserError, match=r"the bytes of 1\.png are missing or spoiled"):
        observe(images, store, Answers())


def test_a_spoiled_observation_is_named(pictures: Path, store: Store, aya: Character):
    images = list(take_in(pictures, store, aya).images)
    observe(images, store, Answers())
    stored(store)[0].write_text("{")
    with pytest.raises(UserError, match="not an observation"):
        observe(images, store, Answers())


def test_captions_are_kept_and_follow_the_rules(pictures: Path, store: Store, aya: Character):
    images = list(take_in(pictures, store, aya).images)
    with pytest.raises(UserError, match=r"no tags for 1\.png yet"):
        caption_all(store, aya)
    assert load_captions(store, "aya") == {}
    observe(images, store, Answers())
    captions = caption_all(store, aya)
    # `smile` on every picture is still no trait of the character; `faint` is under the threshold.
    assert captions == {
        image.sha256: f"ayatok, woman, smile, tag {image.sha256[:4]}" for image in images
    }
    assert load_captions(store, "aya") == captions
    both = aya.model_copy(update={"rules": Rules(form="tags+prose", intrinsic="keep")})
    short = images[0].sha256[:4]
    assert caption_all(store, both)[images[0].sha256] == (
        f"ayatok, woman, smile, tag {short}, a picture of {short}"
    )


def test_prose_captions_need_prose(pictures: Path, store: Store, aya: Character):
    images = list(take_in(pictures, store, aya).images)
    observe(images, store, Answers())
    for path in store.observations.rglob("captioner@*.json"):
        path.unlink()
    assert len(caption_all(store, aya)) == 6
    prose = aya.model_copy(update={"rules": Rules(form="prose")})
    with pytest.raises(UserError, match=r"no prose for 1\.png yet"):
        caption_all(store, prose)


class ShuffledAnswers(Answers):
    """The same answers, all at once at the end, in an order of its own and with its own times."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def ask(self, requests):
        answers = list(super().ask(requests))
        self.random.shuffle(answers)
        for answer in answers:
            yield answer.model_copy(update={"milliseconds": self.random.uniform(1, 99)})


def test_captions_do_not_depend_on_the_order_of_the_answers(
    pictures: Path, tmp_path: Path, aya: Character
):
    kept = []
    both = aya.model_copy(update={"rules": Rules(form="tags+prose")})
    for client in (Answers(), ShuffledAnswers(1), ShuffledAnswers(2)):
        store = Store(tmp_path / f"store-{len(kept)}")
        images = list(take_in(pictures, store, both).images)
        observe(images, store, client)
        caption_all(store, both)
        kept.append((store.characters / "aya" / "captions.jsonl").read_bytes())
    assert kept[0] == kept[1] == kept[2]


def test_a_model_that_was_changed_back_speaks_again(pictures: Path, store: Store, aya: Character):
    images = list(take_in(pictures, store, aya).images)

    class Other(Answers):
        def models(self):
            return {"tags": ("tagger", "r2"), "prose": ("captioner", "r1")}

        def ask(self, requests):
            for answer in super().ask(requests):
                yield answer.model_copy(update={"revision": "r2", "tags": {"other": 0.9}})

    observe(images, store, Answers())
    first = caption_all(store, aya)
    observe(images, store, Other())
    assert caption_all(store, aya) != first
    again = Answers()
    observe(images, store, again)
    assert again.asked == []
    assert caption_all(store, aya) == first


def test_images_of_an_unknown_character_are_not_there(store: Store):
    with pytest.raises(UserError, match="not known"):
        load_images(store, "aya")

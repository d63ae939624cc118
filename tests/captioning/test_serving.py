"""The real thing: tiny models behind Ray Serve, in their own processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from captioning_examples import saved
from PIL import Image as Pillow
from tiny_onnx import write_tagger

from captioning import (
    Character,
    Store,
    UserError,
    caption_all,
    load_observations,
    observe,
    serve_observers,
    take_in,
    upright_rgb,
)
from captioning.observers.captioner import Captioner
from captioning.observers.tagger import Tagger
from captioning.serving import ServedObservers

pytestmark = pytest.mark.slow
BATCH = 8


@pytest.fixture(scope="module")
def fragile_tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its model raises on a white picture, and then on the whole batch that this is in."""
    return write_tagger(tmp_path_factory.mktemp("models") / "fragile", fails_on_white=True)


@pytest.fixture(scope="module")
def client(
    ray_local: None, fragile_tagger: Path, tiny_captioner: Path
) -> Iterator[ServedObservers]:
    with serve_observers(fragile_tagger, tiny_captioner, BATCH) as served:
        yield served


def named(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pictures_of_noise(count: int) -> list[bytes]:
    random = np.random.default_rng(3)
    return [
        saved(Pillow.fromarray(random.integers(0, 200, (40, 30, 3), np.uint8)), "PNG")
        for _ in range(count)
    ]


def test_requests_are_batched_and_answered_as_without_serve(
    client: ServedObservers, fragile_tagger: Path, tiny_captioner: Path
):
    contents = pictures_of_noise(48)
    before = {kind: len(client.batch_sizes(kind)) for kind in ("tags", "prose")}
    requests = [(named(data), kind, data) for data in contents for kind in ("tags", "prose")]
    answers = list(client.ask(requests))
    assert [(answer.image, answer.kind) for answer in answers] == [row[:2] for row in requests]
    pictures = [upright_rgb(data) for data in contents]
    assert [seen.tags for seen in answers[::2]] == Tagger(fragile_tagger).observe(pictures)
    assert [seen.prose for seen in answers[1::2]] == Captioner(tiny_captioner).observe(pictures)
    assert all(answer.error is None and answer.milliseconds > 0 for answer in answers)
    for kind in ("tags", "prose"):
        sizes = client.batch_sizes(kind)[before[kind] :]
        assert sum(sizes) == 48
        assert max(sizes) <= BATCH
        assert np.mean(sizes) > 2


def test_one_picture_that_fails_costs_no_other(client: ServedObservers):
    good = pictures_of_noise(6)
    white = saved(Pillow.new("RGB", (40, 40), "white"), "PNG")
    contents = [*good[:2], b"no picture", *good[2:4], white, *good[4:]]
    answers = list(client.ask((named(data), "tags", data) for data in contents))
    failed = {row: answer.error for row, answer in enumerate(answers) if answer.error}
    assert set(failed) == {2, 5}
    assert failed[2] == "PictureError: not a picture, whatever its name says"
    assert "Gather" in failed[5]
    assert all(answer.tags is not None for row, answer in enumerate(answers) if row not in failed)


def test_from_pictures_to_captions(
    client: ServedObservers, pictures: Path, store: Store, aya: Character
):
    images = list(take_in(pictures, store, aya).images)
    observe(images, store, client)
    assert {seen.model for seen in load_observations(store, images[0].sha256)} == {
        "fragile",
        "tiny-captioner",
    }
    captions = caption_all(store, aya)
    assert len(captions) == 6
    assert all(text.startswith("ayatok, woman") for text in captions.values())


def test_a_second_pair_of_models_leaves_the_first_alone(
    client: ServedObservers, tiny_tagger: Path, tiny_captioner: Path
):
    data = pictures_of_noise(1)[0]
    with serve_observers(tiny_tagger, tiny_captioner) as second:
        assert second.models()["tags"][0] == "tiny-tagger"
        assert next(iter(second.ask([(named(data), "tags", data)]))).error is None
    assert next(iter(client.ask([(named(data), "tags", data)]))).error is None


def test_wrong_models_are_named_at_once(ray_local: None, tmp_path: Path, tiny_tagger: Path):
    with (
        pytest.raises(UserError, match=r"model\.onnx is missing"),
        serve_observers(tmp_path, tmp_path),
    ):
        pass
    with (
        pytest.raises(UserError, match="there is no such folder"),
        serve_observers(tiny_tagger, tmp_path / "nowhere"),
    ):
        pass


def test_a_model_that_does_not_load_is_named(
    ray_local: None, tmp_path: Path, tiny_tagger: Path, tiny_captioner: Path
):
    broken = write_tagger(tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"not onnx")
    with (
        pytest.raises(UserError, match="not an ONNX model"),
        serve_observers(broken, tiny_captioner),
    ):
        pass


def test_without_ray_it_says_so(tiny_tagger: Path, tiny_captioner: Path, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with (
        pytest.raises(UserError, match="Ray is not running"),
        serve_observers(tiny_tagger, tiny_captioner),
    ):
        pass

"""The real thing: tiny models behind Ray Serve, in their own processes, some of them killed."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from captioning_examples import png, saved
from PIL import Image as Pillow
from tiny_onnx import write_tagger

from captioning import (
    CaptionerConfig,
    Character,
    Embedder,
    EmbedderConfig,
    ObserverConfig,
    QualityConfig,
    Store,
    SubjectConfig,
    TaggerConfig,
    UserError,
    caption_all,
    load_observations,
    observe,
    serve_observers,
    take_in,
    upright_rgb,
)
from captioning.asking import ServedObservers
from captioning.observers.captioner import Captioner
from captioning.observers.quality import measure
from captioning.observers.tagger import Tagger

pytestmark = pytest.mark.slow
BATCH = 8
KINDS = ("tags", "prose", "embedding", "quality")


@pytest.fixture(scope="module")
def fragile_tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its model raises on a white picture, and then on the whole batch that this is in."""
    return write_tagger(tmp_path_factory.mktemp("models") / "fragile", fails_on_white=True)


@pytest.fixture(scope="module")
def client(
    ray_local: None, fragile_tagger: Path, tiny_captioner: Path, tiny_clip: Path
) -> Iterator[ServedObservers]:
    """Four observers, the tagger in four replicas."""
    observers: list[ObserverConfig] = [
        TaggerConfig(
            source=str(fragile_tagger), batch_size=BATCH, min_replicas=4, max_replicas=4, cpus=0.1
        ),
        CaptionerConfig(source=str(tiny_captioner), batch_size=BATCH, cpus=0.1),
        EmbedderConfig(source=str(tiny_clip), batch_size=BATCH, cpus=0.1),
        QualityConfig(batch_size=BATCH, cpus=0.1),
    ]
    with serve_observers(observers) as served:
        yield served


def named(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pictures_of_noise(count: int, seed: int = 3) -> list[bytes]:
    random = np.random.default_rng(seed)
    return [
        saved(Pillow.fromarray(random.integers(0, 200, (40, 48, 3), np.uint8)), "PNG")
        for _ in range(count)
    ]


def test_every_picture_is_decoded_once_and_answered_as_without_serve(
    client: ServedObservers, fragile_tagger: Path, tiny_captioner: Path, tiny_clip: Path
):
    contents = pictures_of_noise(48)
    before = {kind: sum(client.batch_sizes(kind)) for kind in KINDS if kind != "tags"}
    decoded = client.decoded
    requests = [(named(data), kind, data) for data in contents for kind in KINDS]
    answers = {(seen.image, seen.kind): seen for seen in client.ask(requests)}
    assert client.decoded - decoded == 48  # for four observers
    assert set(answers) == {row[:2] for row in requests}
    assert all(seen.error is None and seen.milliseconds > 0 for seen in answers.values())
    assert all(
        client.models()[seen.kind] == (seen.model, seen.revision) for seen in answers.values()
    )
    pictures = [upright_rgb(data) for data in contents]

    def said(kind: str) -> list[object]:
        return [getattr(answers[named(data), kind], kind) for data in contents]

    # Four replicas that answer in any order say what one plain loop says.
    assert said("tags") == [seen.tags for seen in Tagger(fragile_tagger).observe(pictures)]
    assert said("prose") == Captioner(tiny_captioner).observe(pictures)
    assert said("quality") == [measure(picture) for picture in pictures]
    np.testing.assert_allclose(
        said("embedding"), Embedder(tiny_clip).embed_images(pictures), atol=2e-6
    )
    for kind, count in before.items():
        sizes = client.batch_sizes(kind)
        assert sum(sizes) - count == 48 and max(sizes) <= BATCH


def test_one_picture_that_fails_costs_no_other(client: ServedObservers):
    good = pictures_of_noise(6)
    white = saved(Pillow.new("RGB", (40, 40), "white"), "PNG")
    contents = [*good[:2], b"no picture", *good[2:4], white, *good[4:]]
    answers = {seen.image: seen for seen in client.ask((named(x), "tags", x) for x in contents)}
    assert len(answers) == len(contents)
    failed = {image: seen.error for image, seen in answers.items() if seen.error}
    assert set(failed) == {named(b"no picture"), named(white)}
    assert failed[named(b"no picture")] == "PictureError: not a picture, whatever its name says"
    assert "Gather" in failed[named(white)]


def test_captions_have_the_same_bytes_with_four_replicas_and_with_one(
    client: ServedObservers, fragile_tagger: Path, aya: Character, tmp_path: Path
):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(np.random.default_rng(5).integers(80, 180, (60, 3))):
        (folder / f"{number}.png").write_bytes(png(tuple(colour.tolist())))

    def captions(served: ServedObservers, run: int) -> dict[str, bytes]:
        store = Store(tmp_path / f"home{run}")
        images = list(take_in(folder, store, aya).images)
        random.Random(run).shuffle(images)
        observe(images, store, served)
        return {image: text.encode() for image, text in caption_all(store, aya).items()}

    first = captions(client, 1)
    assert len(first) == 60 and len(set(first.values())) > 3
    assert all(text.startswith(b"ayatok, woman") for text in first.values())
    assert captions(client, 2) == first
    alone = TaggerConfig(source=str(fragile_tagger), batch_size=BATCH, cpus=0.1)
    with serve_observers([alone]) as one:
        assert captions(one, 3) == first


def _processes(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # ended meanwhile
            continue
    return found


@pytest.mark.parametrize("victim", ["ray::ServeReplica:lorafarm-quality", "ray::ServeController"])
def test_a_killed_process_costs_no_answer_and_repeats_none(
    client: ServedObservers, victim: str, store: Store, aya: Character, tmp_path: Path
):
    folder = tmp_path / "many"
    folder.mkdir()
    for number, data in enumerate(pictures_of_noise(300, seed=len(victim))):
        (folder / f"{number}.png").write_bytes(data)
    images = list(take_in(folder, store, aya).images)
    killed: list[int] = []

    def kill_in_the_middle(done: int, total: int) -> None:
        if done == total // 3:
            killed.extend(process.pid for process in _processes(victim))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    observe(images, store, client, kill_in_the_middle)
    assert killed
    files = list(store.observations.rglob("*.json"))
    assert len(files) == 4 * 300  # each image once by each of the four
    seen = [one for image in images for one in load_observations(store, image.sha256)]
    assert all(one.error is None for one in seen)


def test_another_set_scales_up_from_zero_and_leaves_the_first_alone(
    client: ServedObservers, tiny_tagger: Path
):
    data = pictures_of_noise(1)[0]
    observers: list[ObserverConfig] = [
        TaggerConfig(source=str(tiny_tagger), min_replicas=0, cpus=0.1),
        SubjectConfig(min_replicas=0, cpus=0.1),
    ]
    with serve_observers(observers) as second:
        assert second.models()["tags"][0] == "tiny-tagger"
        assert _processes("ray::ServeReplica:lorafarm-boxes") == []
        tags, boxes = sorted(
            second.ask([(named(data), kind, data) for kind in ("tags", "boxes")]),
            key=lambda seen: seen.kind == "boxes",
        )
        assert tags.tags is not None and boxes.boxes is not None
    assert next(iter(client.ask([(named(data), "tags", data)]))).error is None


def test_wrong_models_are_named_at_once(
    ray_local: None, tmp_path: Path, tiny_tagger: Path, tiny_captioner: Path
):
    broken = write_tagger(tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"not onnx")
    wrong: list[tuple[str, list[ObserverConfig]]] = [
        (r"model\.onnx is missing", [TaggerConfig(source=str(tmp_path))]),
        ("there is no such folder", [CaptionerConfig(source=str(tmp_path / "nowhere"))]),
        ("both answer with tags", [TaggerConfig(source=str(tiny_tagger))] * 2),
        ("the list is empty", []),
        ("not an ONNX model", [TaggerConfig(source=str(broken))]),
    ]
    for message, observers in wrong:
        with pytest.raises(UserError, match=message), serve_observers(observers):
            pass


def test_without_ray_it_says_so(monkeypatch: pytest.MonkeyPatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match="Ray is not running"), serve_observers([QualityConfig()]):
        pass


CLIENT = """
import sys
from pathlib import Path
from captioning import QualityConfig, load_images, observe, serve_observers
from services.farm.engine import running_ray
from services.farm.settings import Home, Settings

home = Home(Path(sys.argv[1]), Settings(cpus_per_worker=1))
with running_ray(home), serve_observers([QualityConfig()]) as client:
    observe(load_images(home.store, "aya"), home.store, client)
"""


def test_a_killed_client_goes_on_where_it_was(tmp_path: Path, aya: Character):
    store = Store(tmp_path / "home")
    folder = tmp_path / "many"
    folder.mkdir()
    for number, data in enumerate(pictures_of_noise(300)):
        (folder / f"{number}.png").write_bytes(data)
    take_in(folder, store, aya)
    command = [sys.executable, "-c", CLIENT, str(tmp_path / "home")]
    first = subprocess.Popen(command, start_new_session=True)
    while first.poll() is None and len(list(store.observations.rglob("*.json"))) < 60:
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = {path: path.read_bytes() for path in store.observations.rglob("*.json")}
    assert 60 <= len(kept) < 300
    subprocess.run(command, check=True, timeout=300)
    files = list(store.observations.rglob("*.json"))
    assert len(files) == 300
    assert all(path.read_bytes() == data for path, data in kept.items())

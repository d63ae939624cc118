import errno
import json
import os
import tomllib
from pathlib import Path

import pytest
from captioning_examples import Answers, png, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from captioning import (
    Character,
    DatasetVersion,
    Decision,
    ModelUsed,
    Override,
    Store,
    UserError,
    caption_all,
    decide,
    find_dataset,
    freeze,
    latest_dataset,
    list_dataset_versions,
    load_dataset,
    load_images,
    load_observations,
    observe,
    override,
    take_in,
)


@pytest.fixture
def captioned(pictures: Path, store: Store, aya: Character) -> Character:
    add(pictures, store, aya)
    return aya


def add(pictures: Path, store: Store, character: Character) -> None:
    observe(list(take_in(pictures, store, character).images), store, Answers())
    caption_all(store, character)


def test_a_version_holds_all_that_a_trainer_reads(
    pictures: Path, store: Store, captioned: Character
):
    (pictures / "bad.png").write_text("text")
    add(pictures, store, captioned)
    version = freeze(store, captioned)
    assert version.name.startswith("v0001-") and version.path.name == version.name
    assert version.path == store.datasets / "aya" / version.name
    assert (version.character, version.trigger, version.class_word) == ("aya", "ayatok", "woman")
    assert (len(version.train), len(version.holdout)) == (5, 1)
    for sample in (*version.train, *version.holdout):
        assert sample.path.read_bytes() == store.blobs.get(sample.sha256)
        assert sample.path.with_suffix(".txt").read_text() == sample.caption
        assert sample.caption.startswith("ayatok, woman")
        assert (sample.width, sample.height) == (64, 64)
    names = sorted(path.name for path in (version.path / "images").iterdir())
    assert names == sorted(f"{n:04d}{end}" for n in range(1, 6) for end in (".png", ".txt"))
    rows = [json.loads(row) for row in (version.path / "metadata.jsonl").read_text().splitlines()]
    assert rows == [
        {"file_name": sample.path.relative_to(version.path).as_posix(), "text": sample.caption}
        for sample in version.train
    ]
    kohya = tomllib.loads((version.path / "dataset.toml").read_text())
    assert kohya["general"]["keep_tokens"] == 1
    assert kohya["datasets"][0]["resolution"] == 64
    assert kohya["datasets"][0]["subsets"][0]["image_dir"] == "images"
    rejected = json.loads((version.path / "rejected.jsonl").read_text())
    assert rejected["source"] == "bad.png"


def test_the_hugging_face_rule_finds_every_picture(store: Store, captioned: Character):
    version = freeze(store, captioned)
    for name in ("metadata.jsonl", "holdout.jsonl"):
        for line in (version.path / name).read_text().splitlines():
            with Pillow.open(version.path / json.loads(line)["file_name"]) as picture:
                picture.verify()


def test_the_same_content_is_not_made_twice(store: Store, captioned: Character):
    first = freeze(store, captioned)
    assert freeze(store, captioned) == first == load_dataset(first.path)
    assert latest_dataset(store, "aya") == first
    assert list_dataset_versions(store, "aya") == [first]


def test_other_content_gets_the_next_number(pictures: Path, store: Store, captioned: Character):
    first = freeze(store, captioned)
    (pictures / "7.png").write_bytes(png("blue"))
    add(pictures, store, captioned)
    second = freeze(store, captioned)
    assert second.name.startswith("v0002-")
    assert list_dataset_versions(store, "aya") == [first, second]
    assert latest_dataset(store, "aya") == second
    assert load_dataset(first.path) == first


def test_the_same_pictures_give_the_same_name_in_another_store(
    tmp_path: Path, pictures: Path, store: Store, captioned: Character
):
    other = Store(tmp_path / "other")
    add(pictures, other, captioned)
    first, second = freeze(store, captioned), freeze(other, captioned)
    assert (first.name, first.manifest_sha256) == (second.name, second.manifest_sha256)


def test_formats_keep_their_bytes_and_get_their_suffix(
    pictures: Path, store: Store, aya: Character
):
    photo = saved(Pillow.new("RGB", (70, 50), "blue"), "JPEG")
    (pictures / "photo.png").write_bytes(photo)  # a JPEG under a wrong name
    add(pictures, store, aya)
    version = freeze(store, aya, holdout_share=0)
    assert version.holdout == ()
    found = [sample for sample in version.train if sample.path.suffix == ".jpg"]
    assert [sample.path.read_bytes() for sample in found] == [photo]


def test_few_pictures_have_no_holdout(pictures: Path, store: Store, aya: Character):
    for number in (5, 6):
        (pictures / f"{number}.png").unlink()
    add(pictures, store, aya)
    version = freeze(store, aya)
    assert (len(version.train), len(version.holdout)) == (4, 0)


def test_the_manifest_says_what_the_version_is_made_of(
    pictures: Path, store: Store, captioned: Character
):
    first = freeze(store, captioned, findings={"IMG004": 2, "CAP101": 1})
    assert (first.parent, dict(first.rules)) == (None, captioned.rules.model_dump(mode="json"))
    assert first.models == (
        ModelUsed("prose", "captioner", "r1"),
        ModelUsed("tags", "tagger", "r1"),
    )
    decide(store, "aya", [Decision(image=first.train[0].sha256, keep=False, reason="blurred")])
    override(store, "aya", Override(code="IMG004", reason="meant so", by="kim"))
    second = freeze(store, captioned, seed=3)
    assert second.parent == first.name
    manifest = json.loads((second.path / "manifest.json").read_text())
    assert manifest["overrides"] == [
        {"code": "IMG004", "where": "", "reason": "meant so", "by": "kim"}
    ]
    assert manifest["split"] == {"holdout_share": 0.2, "seed": 3}
    findings = json.loads((first.path / "manifest.json").read_text())["findings"]
    assert findings.items() >= {"CAP101": 1, "IMG004": 2}.items()
    rejected = json.loads((second.path / "rejected.jsonl").read_text())
    assert (rejected["source"], rejected["reason"]) == (first.train[0].source, "blurred")


def test_rules_and_models_make_another_version(store: Store, captioned: Character):
    names = {freeze(store, captioned).name[-8:]}
    image = load_images(store, "aya")[0]
    seen = load_observations(store, image.sha256)[0].model_copy(update={"revision": "r2"})
    (store.observations / image.sha256 / f"{seen.model}@r2.json").write_text(
        seen.model_dump_json(exclude_none=True)
    )
    names.add(freeze(store, captioned).name[-8:])
    rules = captioned.rules.model_copy(update={"threshold": 0.5})
    names.add(freeze(store, captioned.model_copy(update={"rules": rules})).name[-8:])
    assert len(names) == 3


def test_the_name_does_not_hang_on_file_names(
    tmp_path: Path, pictures: Path, store: Store, captioned: Character
):
    for number in range(1, 7):
        (pictures / f"{number}.png").rename(pictures / f"other{9 - number}.png")
    other = Store(tmp_path / "other")
    add(pictures, other, captioned)
    assert freeze(store, captioned).name == freeze(other, captioned).name


def test_the_holdout_covers_the_framings(pictures: Path, store: Store, aya: Character):
    class Framed(Answers):
        def ask(self, requests):
            for place, seen in enumerate(super().ask(requests)):
                if seen.tags is not None:
                    framing = ("portrait", "upper body", "full body")[place // 2 % 3]
                    seen = seen.model_copy(update={"tags": {framing: 0.9, **seen.tags}})
                yield seen

    observe(list(take_in(pictures, store, aya).images), store, Framed())
    caption_all(store, aya)
    version = freeze(store, aya, holdout_share=0.5)
    assert {one.framing for one in version.holdout} == {"close-up", "upper", "full"}
    assert {one.framing for one in version.train} == {"close-up", "upper", "full"}


def test_a_version_is_found_by_what_people_call_it(
    pictures: Path, store: Store, captioned: Character
):
    first = freeze(store, captioned)
    (pictures / "7.png").write_bytes(png("blue"))
    add(pictures, store, captioned)
    second = freeze(store, captioned)
    for name in ("aya@v1", "aya@1", "aya@v0001", f"aya@{first.name}"):
        assert find_dataset(store, name) == first
    for name in ("aya", "aya@", "aya@v2"):
        assert find_dataset(store, name) == second
    with pytest.raises(UserError, match=f"known are {first.name}, {second.name}"):
        find_dataset(store, "aya@v3")
    with pytest.raises(UserError, match="ben: not known; known are aya"):
        find_dataset(store, "ben@v1")
    with pytest.raises(UserError, match="not a name"):
        find_dataset(store, "../aya@v1")
    twin = first.path.with_name("v0001-ffffffff")
    twin.mkdir()
    with pytest.raises(UserError, match="are both of that name"):
        find_dataset(store, "aya@v1")


def test_a_manifest_of_another_format_says_so(store: Store, captioned: Character):
    version = freeze(store, captioned)
    file = version.path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))
    with pytest.raises(UserError, match="written in format 1, not 2"):
        load_dataset(version.path)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.5), seed=st.integers(0, 3))
def test_every_picture_is_in_exactly_one_split(
    store: Store, pictures: Path, aya: Character, share: float, seed: int
):
    add(pictures, store, aya)
    version = freeze(store, aya, share, seed)
    train = {sample.sha256 for sample in version.train}
    held = {sample.sha256 for sample in version.holdout}
    assert not train & held
    assert len(train) + len(held) == 6
    assert train and bool(held) == (share > 0)
    assert freeze(store, aya, share, seed) == version


def test_a_new_picture_moves_few_between_the_splits(
    pictures: Path, store: Store, captioned: Character
):
    for number in range(7, 31):
        (pictures / f"{number}.png").write_bytes(png((0, number, 0)))
    add(pictures, store, captioned)
    first = freeze(store, captioned)
    (pictures / "31.png").write_bytes(png("blue"))
    add(pictures, store, captioned)
    held, more = ({s.sha256 for s in v.holdout} for v in (first, freeze(store, captioned)))
    assert len(held - more) <= 1


@pytest.mark.parametrize("share", [-0.1, 0.6, 1.0, float("nan")])
def test_a_share_that_leaves_nothing_to_train_on_is_refused(
    store: Store, captioned: Character, share: float
):
    with pytest.raises(UserError, match=r"give a share of 0 to 0\.5"):
        freeze(store, captioned, share)


def test_pictures_without_captions_are_refused(pictures: Path, store: Store, aya: Character):
    take_in(pictures, store, aya)
    with pytest.raises(UserError, match="6 of 6 pictures have no caption"):
        freeze(store, aya)
    with pytest.raises(UserError, match="no dataset version yet"):
        latest_dataset(store, "aya")


def change_picture(version: DatasetVersion) -> Path:
    file = version.train[2].path
    file.write_bytes(file.read_bytes() + b"x")
    return file


def change_caption(version: DatasetVersion) -> Path:
    file = version.train[0].path.with_suffix(".txt")
    file.write_text("something else")
    return file


def remove_picture(version: DatasetVersion) -> Path:
    version.train[1].path.unlink()
    return version.train[1].path


def change_manifest(version: DatasetVersion) -> Path:
    file = version.path / "manifest.json"
    file.write_text(file.read_text().replace('"ayatok"', '"other"'))
    return file


def change_parent(version: DatasetVersion) -> Path:
    file = version.path / "manifest.json"
    file.write_text(file.read_text().replace('"parent": null', '"parent": "v0007-00000000"'))
    return file


def tear_manifest(version: DatasetVersion) -> Path:
    file = version.path / "manifest.json"
    file.write_bytes(file.read_bytes()[:100])
    return file


def empty_manifest(version: DatasetVersion) -> Path:
    file = version.path / "manifest.json"
    file.write_text("[]")
    return file


@pytest.mark.parametrize(
    "spoil",
    [
        change_picture,
        change_caption,
        remove_picture,
        change_manifest,
        change_parent,
        tear_manifest,
        empty_manifest,
    ],
)
def test_a_version_that_was_changed_is_refused(store: Store, captioned: Character, spoil):
    version = freeze(store, captioned)
    file = spoil(version)
    for read in (lambda: load_dataset(version.path), lambda: latest_dataset(store, "aya")):
        with pytest.raises(UserError) as caught:
            read()
        assert str(file) in str(caught.value)


def test_a_folder_that_is_no_version_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        load_dataset(tmp_path)


def test_a_full_disk_leaves_no_version(
    store: Store, captioned: Character, monkeypatch: pytest.MonkeyPatch
):
    real, calls = os.fsync, []

    def no_space(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        freeze(store, captioned)
    monkeypatch.undo()
    assert list((store.datasets / "aya").iterdir()) == []
    assert freeze(store, captioned).name.startswith("v0001-")

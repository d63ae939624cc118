import errno
import hashlib
import os
from pathlib import Path

import pytest
from captioning_examples import png, saved
from PIL import Image as Pillow

from captioning import (
    Character,
    IntakeReport,
    Rules,
    Store,
    UserError,
    add_character,
    list_characters,
    load_character,
    load_images,
    load_skipped,
    take_in,
)


def reasons(report: IntakeReport) -> dict[str, str]:
    return {item.source: item.reason for item in report.skipped}


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_pictures_come_in_natural_order_with_their_bytes(
    pictures: Path, store: Store, aya: Character
):
    (pictures / "10.png").write_bytes(png("blue"))
    (pictures / "sub").mkdir()
    (pictures / "sub" / "a.JPG").write_bytes(saved(Pillow.new("RGB", (50, 40)), "JPEG"))
    seen = []
    report = take_in(pictures, store, aya, lambda done, total: seen.append((done, total)))
    names = ["1.png", "2.png", "3.png", "4.png", "5.png", "6.png", "10.png", "sub/a.JPG"]
    assert [image.source for image in report.images] == names
    assert seen == [(done, 8) for done in range(1, 9)]
    for image in report.images:
        assert store.blobs.get(image.sha256) == (pictures / image.source).read_bytes()
    assert (report.images[-1].width, report.images[-1].height) == (50, 40)
    assert report.images[-1].format == "JPEG"
    assert load_images(store, "aya") == list(report.images)
    assert load_character(store, "aya") == aya


def test_the_folder_stays_as_it_was(pictures: Path, store: Store, aya: Character):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(pictures)}
    take_in(pictures, store, aya)
    assert before == {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(pictures)
    }


def test_exact_duplicates_are_merged(pictures: Path, store: Store, aya: Character):
    (pictures / "7.png").write_bytes((pictures / "1.png").read_bytes())
    report = take_in(pictures, store, aya)
    assert (len(report.images), report.duplicates) == (6, 1)


def test_bad_files_among_good_ones_are_skipped_with_a_reason(
    tmp_path: Path, pictures: Path, store: Store, aya: Character
):
    outside = tmp_path / "outside.png"
    outside.write_bytes(png("green"))
    (pictures / "cut.png").write_bytes(png("pink", (200, 200))[:150])
    (pictures / "text.png").write_text("I am a text")
    (pictures / "empty.png").touch()
    (pictures / "dot.png").write_bytes(png("red", (8, 8)))
    (pictures / "phone.heic").write_bytes(b"ftypheic")
    (pictures / "away.png").symlink_to(outside)
    (pictures / "dead.png").symlink_to(pictures / "nothing.png")
    (pictures / "loop.png").symlink_to(pictures / "loop.png")
    (pictures / ".hidden.png").write_bytes(png("green"))
    (pictures / "notes.txt").write_text("captions by hand")
    report = take_in(pictures, store, aya)
    assert len(report.images) == 6
    found = reasons(report)
    assert found.pop("cut.png").startswith("damaged")
    assert found.pop("text.png") == "not a picture, whatever its name says"
    assert found.pop("empty.png") == "an empty file"
    assert found.pop("dot.png") == "8×8 px is smaller than 32 px"
    assert found.pop("phone.heic") == ".heic is not read; save it as PNG or JPEG"
    assert found.pop("away.png") == "a link that leads out of the folder"
    assert found.pop("dead.png").startswith("not readable")
    assert found.pop("loop.png").startswith("not readable")
    assert found == {}
    assert load_skipped(store, "aya") == list(report.skipped)
    assert not store.blobs.path(hashlib.sha256(outside.read_bytes()).hexdigest()).exists()


def test_a_linked_folder_is_not_followed(
    tmp_path: Path, pictures: Path, store: Store, aya: Character
):
    private = tmp_path / "private"
    private.mkdir()
    (private / "secret.png").write_bytes(png("green"))
    (pictures / "link").symlink_to(private)
    assert len(take_in(pictures, store, aya).images) == 6


def test_no_picture_writes_nothing(tmp_path: Path, store: Store, aya: Character):
    empty = tmp_path / "empty"
    with pytest.raises(UserError, match="there is no such folder"):
        take_in(empty, store, aya)
    empty.mkdir()
    with pytest.raises(UserError, match="no pictures in it"):
        take_in(empty, store, aya)
    (empty / "text.png").write_text("text")
    with pytest.raises(UserError, match=r"text\.png: not a picture"):
        take_in(empty, store, aya)
    with pytest.raises(UserError, match="there is no such folder"):
        take_in(empty / "text.png", store, aya)
    assert not store.root.exists()


def test_adding_again_merges(pictures: Path, store: Store, aya: Character):
    first = take_in(pictures, store, aya)
    assert take_in(pictures, store, aya) == first
    assert len(load_images(store, "aya")) == 6
    (pictures / "1.png").unlink()
    (pictures / "7.png").write_bytes(png("blue"))
    take_in(pictures, store, aya)
    sources = [image.source for image in load_images(store, "aya")]
    assert sources == ["1.png", "2.png", "3.png", "4.png", "5.png", "6.png", "7.png"]


def test_a_repaired_file_leaves_the_skipped(pictures: Path, store: Store, aya: Character):
    (pictures / "7.png").write_text("broken")
    take_in(pictures, store, aya)
    (pictures / "7.png").write_bytes(png("blue"))
    take_in(pictures, store, aya)
    assert load_skipped(store, "aya") == []
    assert len(load_images(store, "aya")) == 7


def test_a_known_character_keeps_its_rules_and_its_trigger(
    pictures: Path, store: Store, aya: Character
):
    tuned = aya.model_copy(update={"rules": Rules(threshold=0.6)})
    add_character(store, tuned)
    take_in(pictures, store, aya)
    assert load_character(store, "aya").rules.threshold == 0.6
    with pytest.raises(UserError, match="it has the trigger 'ayatok' already, not 'zzz'"):
        take_in(pictures, store, aya.model_copy(update={"trigger": "zzz"}))


def test_odd_file_names_survive(pictures: Path, store: Store, aya: Character):
    (pictures / "line\u2028break é 猫.png").write_bytes(png("blue"))
    Path(os.fsdecode(os.fsencode(pictures) + b"/latin\xe9.png")).write_bytes(png("green"))
    take_in(pictures, store, aya)
    sources = [image.source for image in load_images(store, "aya")]
    assert "line\u2028break é 猫.png" in sources
    assert "latin\ufffd.png" in sources


def test_a_spoiled_blob_is_made_good_by_adding_again(pictures: Path, store: Store, aya: Character):
    image = take_in(pictures, store, aya).images[0]
    store.blobs.path(image.sha256).write_bytes(b"rotten")
    take_in(pictures, store, aya)
    assert store.blobs.get(image.sha256) == (pictures / image.source).read_bytes()


def test_a_full_disk_leaves_no_character_and_nothing_half_written(
    pictures: Path, store: Store, aya: Character, monkeypatch: pytest.MonkeyPatch
):
    real, written = os.fsync, []

    def no_space_after_four(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 8:  # a file and its folder are synced for each blob
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", no_space_after_four)
    with pytest.raises(OSError, match="No space left"):
        take_in(pictures, store, aya)
    monkeypatch.undo()
    assert list_characters(store) == []
    assert all(
        hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in files(store.root)
    )
    assert len(take_in(pictures, store, aya).images) == 6

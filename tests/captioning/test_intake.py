import errno
import hashlib
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from captioning_examples import png, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

import captioning.intake
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
from captioning.sources import natural


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


def test_what_was_given_stays_as_it_was_byte_for_byte(pictures: Path, store: Store, aya: Character):
    (pictures / "1.txt").write_text("red hair")
    (pictures / "broken.png").write_text("no picture")
    with zipfile.ZipFile(pictures / "more.zip", "w") as made:
        made.writestr("8.png", png("green"))
    (pictures / "9.png").symlink_to(pictures / "1.png")

    def state() -> dict[Path, tuple[bytes, int, int]]:
        return {
            path: (path.read_bytes(), path.lstat().st_mtime_ns, path.lstat().st_mode)
            for path in files(pictures)
        }

    before, folder_time = state(), pictures.stat().st_mtime_ns
    take_in([pictures, pictures / "more.zip"], store, aya)
    assert (state(), pictures.stat().st_mtime_ns) == (before, folder_time)


def test_folders_archives_and_files_are_taken_together(
    tmp_path: Path, pictures: Path, store: Store, aya: Character
):
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as made:
        made.writestr("1.png", png("green"))
        made.writestr("1.txt", "green hair")
    other = tmp_path / "other" / "pictures"
    other.mkdir(parents=True)
    (other / "1.png").write_bytes(png("blue"))
    single = tmp_path / "single.png"
    single.write_bytes(png("white"))
    report = take_in([pictures, tmp_path / "more.zip", other, single, pictures], store, aya)
    assert [image.source for image in report.images[-3:]] == [
        f"{tmp_path.name}/more.zip/1.png",
        "other/pictures/1.png",
        f"{tmp_path.name}/single.png",
    ]
    assert len(report.images) == 9 and report.duplicates == 0
    assert [(one.source, one.text) for one in report.imported] == [
        (f"{tmp_path.name}/more.zip/1.png", "green hair")
    ]


def test_a_single_picture_with_its_caption(pictures: Path, store: Store, aya: Character):
    (pictures / "1.txt").write_text("red hair")
    report = take_in([pictures / "1.png", pictures / "1.txt"], store, aya)
    assert [image.source for image in report.images] == ["1.png"]
    assert [(one.origin, one.text) for one in report.imported] == [("1.txt", "red hair")]


def test_an_animation_is_taken_as_its_first_frame_and_said(
    pictures: Path, store: Store, aya: Character
):
    frames = [Pillow.new("RGB", (40, 40), colour) for colour in ("red", "blue", "green")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    (pictures / "moving.gif").write_bytes(data)
    report = take_in(pictures, store, aya)
    assert [(note.source, note.reason) for note in report.notes] == [
        ("moving.gif", "has 3 frames or pages; the first is used")
    ]
    assert load_images(store, "aya")[-1].frames == 3


def test_an_intake_that_was_killed_goes_on_without_decoding_again(
    pictures: Path, store: Store, aya: Character, monkeypatch: pytest.MonkeyPatch
):
    def stop_after_four(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_in(pictures, store, aya, stop_after_four)
    assert list_characters(store) == []
    journal = store.characters / "aya" / "intake-journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])  # as a power cut would leave it
    decoded = []
    real = captioning.intake.inspect
    monkeypatch.setattr(
        captioning.intake, "inspect", lambda data: decoded.append(data) or real(data)
    )
    report = take_in(pictures, store, aya)
    assert decoded == [(pictures / f"{number}.png").read_bytes() for number in (4, 5, 6)]
    assert [image.source for image in report.images] == [f"{n}.png" for n in range(1, 7)]
    assert not journal.exists()
    take_in(pictures, store, aya)
    assert len(decoded) == 3


def test_what_a_killed_intake_saw_is_not_taken_by_another(
    tmp_path: Path, pictures: Path, store: Store, aya: Character
):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_in(pictures, store, aya, stop)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.png").write_bytes(png("blue"))
    take_in(tmp_path / "other", store, aya)
    assert [image.source for image in load_images(store, "aya")] == ["x.png"]


def test_one_picture_is_in_memory_at_a_time(tmp_path: Path, store: Store, aya: Character):
    folder = tmp_path / "large"
    folder.mkdir()
    for number in range(20):
        colours = np.random.default_rng(number).integers(0, 256, (512, 512, 3), np.uint8)
        (folder / f"{number}.bmp").write_bytes(saved(Pillow.fromarray(colours), "BMP"))
    tracemalloc.start()
    try:
        report = take_in(folder, store, aya)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(report.images) == 20
    assert peak_bytes < 4 * 1024 * 1024  # all together have 15 MB, one has 0.8 MB


@settings(max_examples=200)
@given(names=st.lists(st.text(st.sampled_from("0129²a.é٣"), max_size=6)))
def test_any_names_can_be_put_in_order(names: list[str]):
    backwards = list(reversed(names))
    assert sorted(names, key=natural) == sorted(backwards, key=natural)


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
    with pytest.raises(UserError, match=r"text\.png: not a picture"):
        take_in(empty / "text.png", store, aya)
    with pytest.raises(UserError, match="nothing was given"):
        take_in([], store, aya)
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
    (pictures / "\x1b[31mred\x07.png").write_bytes(png("white"))
    (pictures / "\x1b[31mred\x07.txt").write_text("red coat")
    report = take_in(pictures, store, aya)
    sources = [image.source for image in load_images(store, "aya")]
    assert "\ufffd[31mred\ufffd.png" in sources
    assert [one.text for one in report.imported] == ["red coat"]
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
    written_files = {path.name: path.read_bytes() for path in files(store.root)}
    journal = written_files.pop("intake-journal.jsonl")
    assert len(written_files) == 4 and len(journal.split()) >= 4
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in written_files.items())
    assert len(take_in(pictures, store, aya).images) == 6

"""Every export read again by the other tool's own rule."""

import csv
import json
import tomllib
from pathlib import Path

import pytest
from captioning_examples import Answers
from hypothesis import given
from hypothesis import strategies as st

from captioning import (
    Character,
    DatasetVersion,
    Edit,
    Store,
    UserError,
    caption_all,
    freeze,
    load_images,
    load_imported,
    observe,
    record_edits,
    take_in,
)
from captioning.exports import PROFILES, caption_for, export_version

FORMATS = list(PROFILES)


@pytest.fixture
def version(pictures: Path, store: Store, aya: Character) -> DatasetVersion:
    """Five pictures to train on and one held out; one caption has emphasis and an accent."""
    rules = aya.rules.model_copy(update={"weight_syntax": True})
    aya = aya.model_copy(update={"rules": rules})
    take_in(pictures, store, aya)
    observe(load_images(store, "aya"), store, Answers())
    edit = {"action": "caption", "value": "ayatok, café, (red eyes:1.3), the ayatok's smile"}
    record_edits(
        store, "aya", [Edit(image=one.sha256, **edit) for one in load_images(store, "aya")]
    )
    caption_all(store, aya)
    return freeze(store, aya)


def read_kohya(folder: Path) -> dict[str, str]:
    """sd-scripts' `read_caption`: the first line of the .txt, UTF-8; empty ones are an error."""
    config = tomllib.loads((folder / "dataset.toml").read_text("utf-8"))
    subset = config["datasets"][0]["subsets"][0]
    extension = config["general"]["caption_extension"]
    found = {}
    for picture in Path(subset["image_dir"]).glob("*.png"):
        lines = picture.with_suffix(extension).read_text("utf-8").splitlines()
        found[picture.name] = lines[0].strip()
        assert found[picture.name] and len(lines) == 1
    return found


def read_imagefolder(folder: Path) -> dict[str, str]:
    """`load_dataset("imagefolder")`: metadata.jsonl inside the split's folder, paths from there."""
    (split,) = [path for path in folder.iterdir() if path.is_dir()]
    assert split.name == "train"
    rows = [json.loads(line) for line in (split / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert all(set(row) == {"file_name", "text"} for row in rows)
    assert {row["file_name"] for row in rows} == {path.name for path in split.glob("*.png")}
    return {row["file_name"]: row["text"] for row in rows}


def read_ai_toolkit(folder: Path) -> dict[str, str]:
    """Its dataloader: the .txt beside each picture, `[trigger]` replaced by trigger_word."""
    texts = {
        path.name: path.with_suffix(".txt").read_text("utf-8") for path in folder.glob("*.png")
    }
    assert all("ayatok" not in text for text in texts.values())
    return {name: text.replace("[trigger]", "ayatok") for name, text in texts.items()}


def read_csv(folder: Path) -> dict[str, str]:
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return {row["file_name"]: row["text"] for row in csv.DictReader(file)}


READERS = {
    "kohya": read_kohya,
    "imagefolder": read_imagefolder,
    "ai-toolkit": read_ai_toolkit,
    "csv": read_csv,
}


@pytest.mark.parametrize("form", FORMATS)
def test_the_other_tool_reads_what_was_frozen(tmp_path: Path, version: DatasetVersion, form: str):
    folder = export_version(version, tmp_path / "out" / form, form)
    read = READERS[form](folder)
    assert set(read) == {sample.path.name for sample in version.train}
    for sample in version.train:
        (copy,) = folder.rglob(sample.path.name)
        assert copy.read_bytes() == sample.path.read_bytes()
        assert "(red eyes:1.3)" in sample.caption
        plain = sample.caption.replace("(red eyes:1.3)", "red eyes")
        assert read[sample.path.name] == (sample.caption if form == "kohya" else plain)
        assert read[sample.path.name].startswith("ayatok, café")
    held = {sample.path.read_bytes() for sample in version.holdout}
    assert held and not held & {path.read_bytes() for path in folder.rglob("*.png")}


def test_what_was_exported_as_a_table_is_taken_in_again(
    tmp_path: Path, version: DatasetVersion, store: Store, aya: Character
):
    for form in ("csv", "imagefolder", "kohya"):
        folder = export_version(version, tmp_path / form, form)
        again = Store(tmp_path / f"store-{form}")
        report = take_in(folder, again, aya)
        expected = {
            sample.sha256: sample.caption
            if form == "kohya"
            else sample.caption.replace("(red eyes:1.3)", "red eyes")
            for sample in version.train
        }
        assert {sha256: one.text for sha256, one in load_imported(again, "aya").items()} == expected
        assert report.notes == ()


def test_views_are_kohya_s_repeats(tmp_path: Path, version: DatasetVersion):
    folder = export_version(version, tmp_path / "out", "kohya", views=25)
    config = tomllib.loads((folder / "dataset.toml").read_text())
    subset = config["datasets"][0]["subsets"][0]
    assert (subset["num_repeats"], subset["class_tokens"]) == (25, "woman")
    assert config["general"]["keep_tokens"] == 1
    assert Path(subset["image_dir"]) == folder / "images"
    for form, views in (("csv", 25), ("kohya", 0), ("kohya", 10**6)):
        with pytest.raises(UserError, match="--views"):
            export_version(version, tmp_path / "other", form, views)
    assert not (tmp_path / "other").exists()


def test_an_export_replaces_an_export(tmp_path: Path, version: DatasetVersion):
    first = export_version(version, tmp_path / "out", "kohya")
    assert export_version(version, tmp_path / "out", "csv") == first
    names = {path.name for path in first.iterdir()}
    assert "dataset.toml" not in names and "metadata.csv" in names
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


@pytest.mark.parametrize("change", ["add", "edit", "no marker", "broken marker"])
def test_foreign_files_are_never_written_over(tmp_path: Path, version: DatasetVersion, change: str):
    folder = export_version(version, tmp_path / "out", "csv")
    file = folder / ("mine.txt" if change == "add" else "metadata.csv")
    if change in ("add", "edit"):
        file.write_text("by hand")
    elif change == "no marker":
        (folder / ".lorafarm-export.json").unlink()
    else:
        (folder / ".lorafarm-export.json").write_text("[")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="files that no export wrote"):
        export_version(version, tmp_path / "out", "kohya")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="a file is there"):
        export_version(version, file if file.exists() else folder / "metadata.csv", "csv")


def test_a_version_is_not_written_over(version: DatasetVersion):
    with pytest.raises(UserError, match="files that no export wrote"):
        export_version(version, version.path, "csv")


@given(
    words=st.lists(st.sampled_from(["ayatok", "ayatoks", "xayatok", "(a b:1.2)", "smile,", "\n"])),
    form=st.sampled_from(FORMATS),
)
def test_a_caption_is_one_line_and_only_the_whole_trigger_is_replaced(words: list[str], form: str):
    line = caption_for(PROFILES[form], "ayatok, " + " ".join(words), "ayatok")
    assert "\n" not in line and line == " ".join(line.split())
    assert ("(a b:1.2)" in line) == (form == "kohya" and "(a b:1.2)" in words)
    assert line.split().count("ayatoks") == words.count("ayatoks")
    assert ("[trigger]" in line) == (form == "ai-toolkit")

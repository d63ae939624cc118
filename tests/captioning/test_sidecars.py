"""Captions that came with the pictures: read in every form, kept, and never a reason to crash."""

import csv
import io
import json
from pathlib import Path

import pytest
from captioning_examples import png
from hypothesis import given
from hypothesis import strategies as st

from captioning import Character, Store, load_imported, take_in
from captioning.sidecars import (
    Line,
    SidecarError,
    parse_csv,
    parse_jsonl,
    parse_kohya,
    parse_text,
)


def imported(store: Store) -> dict[str, str]:
    return {one.source: one.text for one in load_imported(store, "aya").values()}


def test_text_beside_the_picture(pictures: Path, store: Store, aya: Character):
    (pictures / "1.txt").write_text("ayatok, red hair\n", "utf-8")
    (pictures / "2.caption").write_bytes("\ufeffblue hair".encode())
    (pictures / "3.png.txt").write_text("grün", "utf-16")
    (pictures / "notes.txt").write_text("of no picture")
    report = take_in(pictures, store, aya)
    assert imported(store) == {
        "1.png": "ayatok, red hair",
        "2.png": "blue hair",
        "3.png": "grün",
    }
    assert {one.origin for one in report.imported} == {"1.txt", "2.caption", "3.png.txt"}
    assert report.notes == ()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", '1.png,"red hair, smile"\n2.png,"says ""hi"""\n'),
        ("metadata.csv", 'file_name,text\n1.png,"red hair, smile"\n2.png,"says ""hi"""\n'),
        ("metadata.csv", 'Text,File_Name\n"red hair, smile",1.png\n"says ""hi""",2.png\n'),
        ("captions.csv", '1.png,red hair, smile\r\n\r\n2.png,"says ""hi"""\r\n'),
        (
            "metadata.jsonl",
            '{"file_name": "1.png", "text": "red hair, smile"}\n\n'
            '{"file_name": "2.png", "text": "says \\"hi\\"", "width": 3}\n',
        ),
        (
            "meta_cap.json",
            '{"/content/train/1.png": {"caption": "red hair, smile"},'
            ' "2": {"tags": "says \\"hi\\""}}',
        ),
        (
            "meta_cap.json",
            '{"C:\\\\train\\\\1.png": {"caption": "red hair, smile", "tags": "a, b"},'
            ' "2.png": {"caption": "", "tags": "says \\"hi\\""}}',
        ),
    ],
)
def test_tables_in_every_form(
    pictures: Path, store: Store, aya: Character, name: str, content: str
):
    (pictures / name).write_text(content)
    report = take_in(pictures, store, aya)
    assert imported(store) == {"1.png": "red hair, smile", "2.png": 'says "hi"'}
    assert {one.origin for one in report.imported} == {name}
    assert report.notes == ()


def test_kohya_tags_are_kept_beside_the_caption():
    table = parse_kohya(b'{"a.png": {"caption": "a girl", "tags": "red hair, smile,"}}')
    assert table.lines == (Line("a.png", "a girl", ("red hair", "smile")),)


def test_a_table_speaks_of_its_own_folder_first(pictures: Path, store: Store, aya: Character):
    (pictures / "sub").mkdir()
    (pictures / "sub" / "1.png").write_bytes(png("blue"))
    (pictures / "sub" / "metadata.csv").write_text("1.png,below\n")
    (pictures / "metadata.csv").write_text("1.png,above\nsub/1.png,from above\n")
    take_in(pictures, store, aya)
    every = {(one.source, one.origin): one.text for one in load_imported(store, "aya").values()}
    assert every[("1.png", "metadata.csv")] == "above"
    assert len(every) == 2


def test_a_bare_name_that_two_pictures_have_is_not_guessed(
    pictures: Path, store: Store, aya: Character
):
    for colour in ("blue", "green"):
        (pictures / colour).mkdir()
        (pictures / colour / "x.png").write_bytes(png(colour))
    (pictures / "metadata.csv").write_text("x.png,which\nnowhere.png,none\n")
    report = take_in(pictures, store, aya)
    assert report.imported == ()
    assert report.notes[0].reason.startswith("2 of 2 captions are of no picture given here: x.png")


def test_of_several_the_one_beside_the_picture_counts_and_all_are_kept(
    pictures: Path, store: Store, aya: Character
):
    (pictures / "metadata.csv").write_text("1.png,from the table\n")
    (pictures / "1.txt").write_text("from the text")
    (pictures / "meta_cap.json").write_text('{"1": {"caption": "from kohya"}}')
    report = take_in(pictures, store, aya)
    assert imported(store) == {"1.png": "from the text"}
    assert len(report.imported) == 3
    (pictures / "1.txt").write_text("changed since")
    take_in(pictures, store, aya)
    assert imported(store) == {"1.png": "changed since"}
    rows = (store.characters / "aya" / "imported.jsonl").read_text().splitlines()
    assert len(rows) == 3


def test_they_can_be_ignored(pictures: Path, store: Store, aya: Character):
    (pictures / "1.txt").write_text("red hair")
    report = take_in(pictures, store, aya, captions="ignore")
    assert report.imported == () and load_imported(store, "aya") == {}


def test_what_cannot_be_read_is_said(pictures: Path, store: Store, aya: Character):
    (pictures / "1.txt").write_bytes(b"gr\xfcn")
    (pictures / "2.txt").write_text("  \n")
    (pictures / "3.txt").write_bytes(b"x" * 70_000)
    (pictures / "metadata.jsonl").write_text('{"file_name": "4.png"}\nnot json\n')
    (pictures / "meta.json").write_text("[" * 100_000)
    report = take_in(pictures, store, aya)
    said = {note.source: note.reason for note in report.notes}
    assert said.pop("1.txt") == "not UTF-8; save it with that encoding"
    assert said.pop("2.txt") == "an empty caption"
    assert said.pop("3.txt") == "68 KB is no caption"
    assert said.pop("metadata.jsonl").startswith("2 captions not read: line 1")
    assert said.pop("meta.json").startswith("not valid JSON")
    assert said == {} and report.imported == ()


LINE = st.text(min_size=1).filter(lambda text: text.strip() == text)
# A name that a table can hold: not one of the words that make a first line a header.
FILE = LINE.map(lambda name: name + ".png")


@given(rows=st.lists(st.tuples(FILE, LINE), min_size=1), headed=st.booleans())
def test_csv_comes_back_as_it_was_written(rows: list[tuple[str, str]], headed: bool):
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerows([("file_name", "text"), *rows] if headed else rows)
    table = parse_csv(buffer.getvalue().encode("utf-8", "surrogatepass"))
    assert [(line.picture, line.text) for line in table.lines] == rows
    assert table.problems == ()


@given(rows=st.lists(st.tuples(FILE, LINE), min_size=1))
def test_jsonl_comes_back_as_it_was_written(rows: list[tuple[str, str]]):
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    table = parse_jsonl("\n".join(lines).encode())
    assert [(line.picture, line.text) for line in table.lines] == rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["caption", "tags", "file_name", "text"]), inner)
        | st.dictionaries(st.text(), inner, max_size=3)
    ),
)
ANYTHING = st.binary() | st.text().map(str.encode) | JSON.map(lambda one: json.dumps(one).encode())


@given(data=ANYTHING)
@pytest.mark.parametrize("parse", [parse_text, parse_csv, parse_jsonl, parse_kohya])
def test_any_bytes_give_captions_or_one_kind_of_error(parse, data: bytes):
    try:
        found = parse(data)
    except SidecarError as error:
        assert str(error)
        return
    if isinstance(found, str):
        assert found.strip() == found != ""
    else:
        assert all(line.picture.encode() and line.text.encode() for line in found.lines)
        assert found.lines or found.problems

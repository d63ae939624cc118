"""`dataset lint`, `edit` and `override` as people and programs use them."""

import json
import sys
from pathlib import Path

import pytest

from captioning import DatasetVersion, Fixed, Rules, Store, add_character, load_character
from services.cli import main


@pytest.fixture
def lorafarm(
    home_path: Path,
    dataset: DatasetVersion,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Runs `lorafarm dataset ...` on a frozen `aya`; gives exit code, stdout and stderr."""
    store = Store(home_path)
    character = dataset_character(store)
    add_character(store, character)
    monkeypatch.setenv("LORAFARM_HOME", str(home_path))
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lorafarm", "dataset", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out = capsys.readouterr()
        return int(end.value.code or 0), out.out, out.err

    return run


def dataset_character(store: Store):
    from captioning import make_character

    return make_character("aya", "ayachar", "person")


def test_captions_without_a_block_pass(lorafarm):
    code, out, _ = lorafarm("lint", "aya")
    assert code == 0
    assert "12 captions: 0 block" in out and "CAP153" in out


def test_a_block_is_shown_in_its_place_mended_or_overridden(lorafarm):
    code, out, _ = lorafarm("edit", "aya", "03.png", "--add", "blue hat", "--add", "红")
    assert code == 0
    assert "before ayachar, person, smile" in out
    assert "after  ayachar, person, blue hat, smile, 红" in out
    code, out, _ = lorafarm("lint", "aya")
    assert code == 2
    assert "CAP113 block" in out and "03.png" in out and "12 captions: 1 block" in out
    code, _, err = lorafarm("freeze", "aya")
    assert code == 2
    assert "CAP113 03.png" in err and "dataset override aya" in err
    code, _, _ = lorafarm("override", "aya", "CAP113", "--picture", "03.png", "--reason", "a logo")
    assert code == 0
    code, out, _ = lorafarm("lint", "aya")
    assert code == 0 and "1 overridden" in out
    assert lorafarm("freeze", "aya")[0] == 0
    code, out, _ = lorafarm("edit", "aya", "03.png", "--leave", "红")
    assert out.splitlines()[-1] == "after  ayachar, person, blue hat, smile"


def test_programs_get_one_object_a_line(lorafarm):
    lorafarm("edit", "aya", "03.png", "--add", "红")
    code, out, _ = lorafarm("lint", "aya", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 2 and rows[0]["code"] == "CAP113" and rows[0]["blocks"] is True
    assert rows[0]["picture"] == "03.png"
    caption = "ayachar, person, smile, 红"
    assert caption[rows[0]["start"] : rows[0]["end"]] == "红"


def test_fix_records_edits_and_changes_no_file_of_the_models(lorafarm, home_path: Path):
    store = Store(home_path)
    lorafarm("edit", "aya", "04.png", "--caption", "stunning red coat, gray hat")
    before = {file: file.read_bytes() for file in store.observations.rglob("*.json")}
    code, out, _ = lorafarm("lint", "aya", "--fix")
    assert code == 0 and "1 edits recorded" in out and "CAP121" not in out
    _, out, _ = lorafarm("show", "aya")
    assert "ayachar, red coat, grey hat" in out
    assert before == {file: file.read_bytes() for file in store.observations.rglob("*.json")}
    code, out, _ = lorafarm("lint", "aya", "--fix")
    assert "0 edits recorded" in out


def test_rules_from_the_characters_file_are_linted(lorafarm, home_path: Path):
    store = Store(home_path)
    aya = load_character(store, "aya")
    rules = Rules(fixed=(Fixed(tag="smile"),), intrinsic="keep")
    add_character(store, aya.model_copy(update={"rules": rules}))
    code, out, _ = lorafarm("lint", "aya")
    assert code == 0 and "12 captions" in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("edit", "aya", "03.png"), "nothing to change"),
        (("edit", "aya", "03.png", "--add", " , "), "is no tag"),
        (("edit", "aya", "33.png", "--add", "hat"), "did you mean '03.png'"),
        (("override", "aya", "CAP999"), "there is no such code"),
        (("lint", "aja"), "did you mean 'aya'"),
    ],
)
def test_what_is_wrong_is_named(lorafarm, arguments, problem):
    code, _, err = lorafarm(*arguments)
    assert code == 2 and problem in err

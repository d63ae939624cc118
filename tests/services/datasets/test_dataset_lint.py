"""`dataset lint`, `edit` and `override` as people and programs use them."""

import json
from pathlib import Path

import pytest

from captioning import (
    DatasetVersion,
    Fixed,
    Rules,
    Store,
    UserError,
    add_character,
    load_character,
)
from services.datasets.captions import edit_caption
from services.datasets.decisions import override_finding
from services.datasets.lint import as_rows, lint_dataset
from services.farm.settings import open_home


def test_captions_without_a_block_pass(dataset_command):
    code, out, _ = dataset_command("lint", "aya")
    assert code == 0
    assert "12 captions: 0 block" in out and "CAP153" in out


def test_a_block_is_shown_in_its_place_mended_or_overridden(dataset_command):
    code, out, _ = dataset_command("edit", "aya", "03.png", "--add", "blue hat", "--add", "红")
    assert code == 0
    assert "before ayachar, person, smile" in out
    assert "after  ayachar, person, blue hat, smile, 红" in out
    code, out, _ = dataset_command("lint", "aya")
    assert code == 2
    assert "CAP113 block" in out and "03.png" in out and "12 captions: 1 block" in out
    code, _, err = dataset_command("freeze", "aya")
    assert code == 2
    assert "CAP113 03.png" in err and "dataset override aya" in err
    code, _, _ = dataset_command(
        "override", "aya", "CAP113", "--picture", "03.png", "--reason", "a logo"
    )
    assert code == 0
    code, out, _ = dataset_command("lint", "aya")
    assert code == 0 and "1 overridden" in out
    assert dataset_command("freeze", "aya")[0] == 0
    code, out, _ = dataset_command("edit", "aya", "03.png", "--leave", "红")
    assert out.splitlines()[-1] == "after  ayachar, person, blue hat, smile"


def test_programs_get_one_object_a_line(dataset_command):
    dataset_command("edit", "aya", "03.png", "--add", "红")
    code, out, _ = dataset_command("lint", "aya", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 2 and rows[0]["code"] == "CAP113" and rows[0]["blocks"] is True
    assert rows[0]["picture"] == "03.png"
    caption = "ayachar, person, smile, 红"
    assert caption[rows[0]["start"] : rows[0]["end"]] == "红"


def test_fix_records_edits_and_changes_no_file_of_the_models(dataset_command, home_path: Path):
    store = Store(home_path)
    dataset_command("edit", "aya", "04.png", "--caption", "stunning red coat, gray hat")
    before = {file: file.read_bytes() for file in store.observations.rglob("*.json")}
    code, out, _ = dataset_command("lint", "aya", "--fix")
    assert code == 0 and "1 edits recorded" in out and "CAP121" not in out
    _, out, _ = dataset_command("show", "aya")
    assert "ayachar, red coat, grey hat" in out
    assert before == {file: file.read_bytes() for file in store.observations.rglob("*.json")}
    code, out, _ = dataset_command("lint", "aya", "--fix")
    assert "0 edits recorded" in out


def test_rules_from_the_characters_file_are_linted(dataset_command, home_path: Path):
    store = Store(home_path)
    aya = load_character(store, "aya")
    rules = Rules(fixed=(Fixed(tag="smile"),), intrinsic="keep")
    add_character(store, aya.model_copy(update={"rules": rules}))
    code, out, _ = dataset_command("lint", "aya")
    assert code == 0 and "12 captions" in out


def test_a_script_gets_findings_edits_and_overrides_as_values(
    home_path: Path, dataset: DatasetVersion
):
    home = open_home(home_path)
    change = edit_caption(home, "aya", "03.png", [("add", "红")])
    assert change.image.source == "03.png"
    assert (change.before, change.after) == ("ayachar, person, smile", "ayachar, person, smile, 红")
    result = lint_dataset(home, "aya")
    assert [(one.code, result.source(one)) for one in result.blocks] == [("CAP113", "03.png")]
    assert as_rows(result)[0]["blocks"] is True and result.fixed == ()
    accepted = override_finding(home, "aya", "CAP113", "03.png", "a logo")
    assert accepted.where == change.image.sha256
    after = lint_dataset(home, "aya", fix=True)
    assert after.blocks == () and after.count("block") == after.overridden == 1
    with pytest.raises(UserError, match="nothing to change"):
        edit_caption(home, "aya", "03.png", [])


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
def test_what_is_wrong_is_named(dataset_command, arguments, problem):
    code, _, err = dataset_command(*arguments)
    assert code == 2 and problem in err

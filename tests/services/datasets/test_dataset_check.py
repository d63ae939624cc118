"""`lorafarm dataset check` on a small character: exit codes, page, JSON, and drops on request."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from captioning import Observation, Quality, Store, make_character, observe, take_in
from services.cli.main import main
from services.datasets.check import check_dataset
from services.datasets.decisions import drop_proposed
from services.farm.settings import open_home
from services.report.dataset_page import marked


class Answers:
    """Quality alone, given by the test: what a picture is found with is the test's to say."""

    def __init__(self, figures: dict[str, dict[str, object]]):
        self.figures = figures

    def models(self):
        return {"quality": ("quality", "1"), "tags": ("tagger", "1")}

    def ask(self, requests):
        for sha256, kind, _ in requests:
            good = {
                "sharpness": 500, "effective_px": None, "luminance": 0.5, "dark_share": 0.1,
                "bright_share": 0.1, "contrast": 0.2, "entropy_bits": 6, "colourfulness": 0.3,
                "phash": sha256[:16], "pixels_sha256": sha256,
            } | self.figures.get(sha256, {})  # fmt: skip
            said = {"quality": Quality.model_validate(good)}
            if kind == "tags":
                said = {"tags": {"portrait": 0.9, "<b>": 0.8}}
            yield Observation(image=sha256, kind=kind, model=self.models()[kind][0], revision="1",
                              milliseconds=1, **said)  # fmt: skip


@pytest.fixture
def lorafarm(tmp_path: Path, monkeypatch, capsys):
    """Twenty pictures of 80 px, of which 18 is a copy of 01 and 19 is blank."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(20):
        picture = Image.new("RGB", (80, 80), (10 * number, 90, 120))
        ImageDraw.Draw(picture).ellipse((number, 10, 40 + number, 60), "white")
        picture.save(folder / f"{number:02d}.png")
    store = Store(tmp_path / "home")
    images = list(take_in(folder, store, make_character("aya", "ayachar", "person")).images)
    hashes = [image.sha256 for image in images]
    observe(images, store, Answers({
        hashes[18]: {"pixels_sha256": hashes[1], "sharpness": 300},
        hashes[19]: {"contrast": 0.0},
    }))  # fmt: skip
    monkeypatch.setenv("LORAFARM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lorafarm", "dataset", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), capsys.readouterr().out

    return run


def test_blocks_give_exit_code_2_and_apply_mends_them(lorafarm) -> None:
    code, out = lorafarm("check", "aya")
    assert code == 2
    assert "IMG205" in out and "19.png" in out and "2 pictures proposed to drop" in out
    code, out = lorafarm("check", "aya", "--apply")
    assert code == 0 and "2 pictures dropped" in out and "18 pictures" in out
    assert lorafarm("keep", "aya", "19.png", "--reason", "meant")[0] == 0
    code, out = lorafarm("check", "aya", "--apply")
    assert code == 2 and "0 pictures dropped" in out
    assert lorafarm("override", "aya", "IMG205", "--picture", "19.png")[0] == 0
    code, out = lorafarm("check", "aya")
    assert code == 0 and "nothing blocks freezing" in out


def test_a_script_gets_the_check_as_a_value_and_drops_what_it_proposes(
    lorafarm, tmp_path: Path
) -> None:
    home = open_home(tmp_path / "home")
    check = check_dataset(home, "aya")
    assert [(one.code, check.name(one.where)) for one in check.blocks] == [("IMG205", "19.png")]
    assert check.unobserved == 0 and check.base_px == 64 and check.count("block") == 1
    assert drop_proposed(home, "aya") == check.proposed
    after = check_dataset(home, "aya")
    assert len(after.images) == 18 and not after.blocks and after.proposed == ()


def test_before_the_models_have_seen_them_it_does_not_say_that_nothing_blocks(
    lorafarm, tmp_path: Path
) -> None:
    folder = tmp_path / "unseen"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (96, 96), (12 * number, 10, 200)).save(folder / f"{number}.png")
    take_in(folder, Store(tmp_path / "home"), make_character("ben", "benchar", "person"))
    code, out = lorafarm("check", "ben")
    assert code == 0, out
    assert "20 pictures were not observed yet" in out and "nothing blocks" not in out
    page = tmp_path / "check.html"
    assert lorafarm("check", "ben", "--html", page)[0] == 0
    text = page.read_text()
    assert "No model has looked at 20 of the pictures" in text and "Ready to freeze" not in text


def test_json_says_the_same_for_programs(lorafarm) -> None:
    code, out = lorafarm("check", "aya", "--json")
    said = json.loads(out)
    assert code == 2 and said["blocks"] == 1 and said["base_px"] == 64
    found = {(one["source"], one["code"]) for one in said["findings"]}
    assert {("19.png", "IMG205"), ("18.png", "IMG230")} <= found
    assert {one["code"] for one in said["proposed"]} == {"IMG205", "IMG230"}
    assert said["coverage"]["close-up"]["unknown"] == 20


def test_the_page_shows_pictures_and_loads_nothing(lorafarm, tmp_path: Path) -> None:
    page = tmp_path / "check.html"
    assert lorafarm("check", "aya", "--html", page)[0] == 2
    text = page.read_text()
    assert text.index("19.png") < text.index("Copies, side by side") < text.index("00.png")
    assert (
        "Not ready to train" in text and "proposed to drop" in text and "2 more full body" in text
    )
    assert text.count('src="data:image/') >= 20
    assert not re.findall(r'(?:src|href|srcset)="(?!data:)', text) and "<script" not in text


def test_findings_are_marked_in_captions_and_captions_are_escaped() -> None:
    from captioning import Finding

    def at(start: int, end: int) -> Finding:
        return Finding(code="CAP116", severity="warn", where="x", message="", start=start, end=end)

    assert marked("a <b> c", [at(2, 5)]) == "a <mark>&lt;b&gt;</mark> c"
    assert marked("abcdef", [at(1, 4), at(2, 5)]) == "a<mark>bcd</mark><mark>e</mark>f"
    assert marked("abc", [at(1, 99)]) == "a<mark>bc</mark>"

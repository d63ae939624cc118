"""Curation on real pixels: every defect is found, nothing else is, and the known traps hold."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from curated import Curated, curated, quality, seen
from defects import SIDE_PX, character, draw_defects
from PIL import Image as Pillow
from PIL import ImageFilter, ImageOps

import services
from captioning import Character, Image, Observation, Store, load_images, take_in
from captioning.curation import CurationLimits, curate, curation_findings, propose_decisions
from captioning.curation.exposure import exposure_findings
from captioning.curation.observed import Observed
from captioning.curation.sharpness import sharpness_findings
from captioning.observations import _path as observation_path
from captioning.observers.quality import measure
from captioning.store import write_atomic

STARTER_BASE = CurationLimits(base_px=64)  # what the shipped base works at
DEMO = Path(services.__file__).parent / "cli" / "demo" / "pictures"
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def defects() -> tuple[list, Curated]:
    drawn = draw_defects()
    return drawn, curated(drawn)


def png(picture: Pillow.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_every_defect_is_found_and_nothing_else(defects: tuple[list, Curated]) -> None:
    drawn, pictures = defects
    wanted = {(one.name, code) for one in drawn for code in one.codes}
    found = {(name, code) for name, code in pictures.codes() if name != "dataset"}
    counts = {
        kind: Counter(code for _, code in pairs)
        for kind, pairs in (
            ("right", wanted & found), ("missed", wanted - found), ("false", found - wanted),
        )
    }  # fmt: skip
    print(f"\nwrong: {sorted(wanted ^ found)}\n{len(drawn)} pictures\ncode    right missed false")
    for code in sorted({code for _, code in wanted | found}):
        print(code, *(f"{counts[kind][code]:6}" for kind in counts))
    assert len(drawn) >= 60
    assert len({code for _, code in wanted}) >= 12
    assert wanted - found == set() and found - wanted == set()


def test_left_and_right_profiles_are_not_copies(defects: tuple[list, Curated]) -> None:
    drawn, pictures = defects
    profiles = {
        one.name for one in drawn if "facing left" in one.tags or "facing right" in one.tags
    }
    cleaned = {name for name in profiles if name.startswith("clean")}
    assert len(cleaned) > 20
    copies = {name for name, code in pictures.codes() if code in ("IMG230", "IMG231", "IMG232")}
    assert not copies & cleaned


@pytest.mark.parametrize(
    "kind", ["mirrored-of-01.jpg", "crop-of-03.jpg", "crop-mirrored-of-04.jpg"]
)
def test_mirrored_and_cropped_copies_are_grouped_and_the_original_stays(
    defects: tuple[list, Curated], kind: str
) -> None:
    pictures = defects[1]
    found = next(one for one in pictures.findings() if pictures.names.get(one.where) == kind)
    assert found.code == "IMG231"
    assert pictures.names[found.others[0]] == f"clean-{kind[-6:-4]}.png"


def test_decisions_drop_copies_and_blocks_and_nothing_else(defects: tuple[list, Curated]) -> None:
    drawn, pictures = defects
    proposed = propose_decisions(pictures.findings())
    dropped = {pictures.names[one.image] for one in proposed}
    wanted = {"IMG201", "IMG205", "IMG230", "IMG231"}
    expected = {one.name for one in drawn if one.codes & wanted} | {
        "blurred-25.png",
        "blurred-12.png",
    }
    assert dropped == expected
    assert all(not one.keep and one.reason and one.code.startswith("IMG") for one in proposed)


@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_a_blank_canvas_and_a_25_px_blur_are_rejected_at_every_size(side: int) -> None:
    drawing, _ = character(900, 1024)
    blurred = drawing.filter(ImageFilter.GaussianBlur(25)).resize((side, side))
    blank = Pillow.new("RGB", (side, side), (250, 250, 250))
    sharp = [seen(f"sharp {n}", quality=quality(n, sharpness=400.0 + n)) for n in range(5)]
    trap = [seen("blank", side, measure(blank)), seen("blurred", side, measure(blurred))]
    limits = CurationLimits()
    found = exposure_findings(trap, limits) + sharpness_findings([*sharp, trap[1]], limits)
    assert [(one.code, one.severity, one.where) for one in found] == [
        ("IMG205", "block", trap[0].where),
        ("IMG204", "block", trap[1].where),
    ]


def test_a_sharp_flat_drawing_is_kept() -> None:
    flat, _ = character(901, 768)
    others = [seen(f"{n}", quality=quality(n, sharpness=300.0)) for n in range(15)]
    found = curate([seen("flat", 768, measure(flat)), *others])
    assert not [one for one in found if one.severity == "block" or one.code == "IMG204"]


def test_a_picture_tagged_2girls_is_flagged() -> None:
    found = curate([seen("two", tags={"2girls": 0.8}), seen("one", tags={"1girl": 0.9})])
    assert [one.where for one in found if one.code == "IMG210"] == [seen("two").where]


def test_a_tag_counts_from_its_own_taggers_threshold() -> None:
    image = Image("a" * 64, 64, 64, "PNG", "a.png")
    codes = {
        tagger: [found.code for found in curate([Observed(image, {"2girls": 0.3}, tagger=tagger)])]
        for tagger in ("SmilingWolf--wd-vit-tagger-v3", "wd-eva02-large-tagger-v3", "unknown")
    }
    assert {tagger: "IMG210" in found for tagger, found in codes.items()} == {
        "SmilingWolf--wd-vit-tagger-v3": True,
        "wd-eva02-large-tagger-v3": False,
        "unknown": False,
    }


@pytest.mark.parametrize("name", ["aya", "bruno"])
def test_nothing_blocks_the_demo_characters(name: str) -> None:
    files = [(file.name, file.read_bytes()) for file in sorted((DEMO / name).glob("*.png"))]
    found = Curated(files).findings(STARTER_BASE)
    assert len(files) == 24
    assert [one for one in found if one.severity == "block"] == []
    assert propose_decisions(found) == []


def test_nothing_blocks_200_avatars_of_an_unseen_style() -> None:
    sheet = np.asarray(Pillow.open(DATA / "unseen-avatars.png").convert("RGB"))
    cut = sheet.reshape(10, 64, 20, 64, 3).transpose(0, 2, 1, 3, 4).reshape(200, 64, 64, 3)
    found = Curated([(f"{n}", png(Pillow.fromarray(one))) for n, one in enumerate(cut)])
    blocks = [one for one in curate(found.observed, STARTER_BASE) if one.severity == "block"]
    assert blocks == []


def test_curation_leaves_source_and_store_as_they_are(
    tmp_path: Path, store: Store, aya: Character
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png(character(number, 256)[0]))
    (folder / "again.png").write_bytes(png(ImageOps.mirror(character(0, 256)[0])))
    take_in(folder, store, aya)
    for image in load_images(store, aya.name):
        keep_quality(store, image.sha256)
    before = hashes(folder), hashes(store.root)
    first = curation_findings(store, aya)
    assert curation_findings(store, aya) == first and first
    assert (hashes(folder), hashes(store.root)) == before


def test_what_was_not_observed_gives_no_findings_of_its_kind() -> None:
    found = curate([seen(f"{n}", SIDE_PX) for n in range(20)])
    assert found == []


def keep_quality(store: Store, sha256: str) -> None:
    with Pillow.open(store.blobs.path(sha256)) as picture:
        said = Observation(
            image=sha256,
            kind="quality",
            model="quality",
            revision="1",
            quality=measure(picture.convert("RGB")),
            milliseconds=1,
        )
    place = observation_path(store, sha256, "quality", "1")
    write_atomic(place, said.model_dump_json(exclude_none=True).encode())


def hashes(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }

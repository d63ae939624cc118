"""Coverage: which views there are, and in words which are missing."""

from __future__ import annotations

import math

from curated import seen

from captioning import Box
from captioning.curation import CurationLimits, coverage, curate, propose_decisions
from captioning.decisions import Decision, Override

FRONT, LEFT = {"looking at viewer": 0.9}, {"profile": 0.9, "facing left": 0.8}
RIGHT = {"profile": 0.9, "facing right": 0.8}
CLOSE, UPPER, FULL = {"close-up": 0.9}, {"upper body": 0.9}, {"full body": 0.9}


def test_what_is_missing_is_said_in_words_and_signed() -> None:
    found = coverage([CLOSE | FRONT, CLOSE | FRONT, CLOSE | RIGHT, UPPER | FRONT, FULL | FRONT])
    assert found.counts["close-up", "front"] == 2 and found.total("close-up") == 3
    assert found.missing == (
        "2 more close-up pictures in left profile",
        "1 more close-up picture in right profile",
        "1 more upper body picture from the front",
        "1 more full body picture from the front",
    )


def test_a_full_set_misses_nothing() -> None:
    views = [CLOSE | FRONT, CLOSE | LEFT, CLOSE | RIGHT, UPPER | FRONT, FULL | FRONT]
    assert coverage(views * 2).missing == ()


def test_without_directions_only_framings_are_counted() -> None:
    found = coverage([{"portrait": 0.9}] * 6 + [{"far view": 0.9}] * 2)
    assert not found.directions_told
    assert found.missing == ("2 more upper body pictures",)


def test_an_unsigned_profile_counts_for_no_side() -> None:
    found = coverage([CLOSE | {"profile": 0.9}])
    assert found.directions_told and found.unsigned_sides == 1
    assert found.framing_only["close-up"] == 1


def test_too_few_pictures_block_and_a_few_more_warn() -> None:
    codes = {
        count: [one.code for one in curate([seen(f"{n}") for n in range(count)])]
        for count in (4, 5, 14, 15)
    }
    assert codes == {4: ["IMG240"], 5: ["IMG241"], 14: ["IMG241"], 15: []}


def test_the_same_outfit_on_most_pictures_is_said() -> None:
    tags = [{"bikini": 0.9, "close-up": 0.9}] * 14 + [{"red dress": 0.9}] * 6
    found = curate([seen(f"{n}", tags=said) for n, said in enumerate(tags)])
    assert [one.value for one in found if one.code == "IMG243"] == [0.7]
    assert "IMG242" in {one.code for one in found}


def test_a_style_outlier_is_told_by_its_distance_to_the_medoid_and_never_dropped() -> None:
    # Twelve directions a little apart, and one at a right angle to them all.
    near = [(math.cos(0.03 * n), math.sin(0.03 * n), 0.0) for n in range(12)]
    pictures = [
        seen(f"{n}", embedding=vector, embedder="clip@1")
        for n, vector in enumerate([*near, (0.0, 0.0, 1.0)])
    ]
    found = curate(pictures, CurationLimits(same_cosine=1.0))
    assert [one.where for one in found if one.code == "IMG220"] == [pictures[12].where]
    assert propose_decisions(found) == []
    few = curate(pictures[6:])  # seven: no spread can be measured
    assert "IMG220" not in {one.code for one in few}


def test_a_small_subject_and_a_second_person_are_told_by_boxes() -> None:
    def box(label: str, side: float) -> Box:
        return Box(label=label, score=0.9, left=0, top=0, width=side, height=side)

    small = seen("small", boxes=(box("subject", 0.5),))
    two = seen("two", boxes=(box("person", 0.7), box("person", 0.8)))
    large = seen("large", boxes=(box("subject", 0.8),))
    found = {(one.where, one.code) for one in curate([small, two, large])}
    assert (small.where, "IMG212") in found and (two.where, "IMG210") in found
    assert not {code for where, code in found if where == large.where}


def test_a_drop_is_not_proposed_against_a_person_or_an_override() -> None:
    small = seen("small", 100)
    found = curate([small, *(seen(f"{n}") for n in range(20))])
    assert [one.image for one in propose_decisions(found)] == [small.where]
    kept = {small.where: Decision(image=small.where, keep=True)}
    assert propose_decisions(found, kept) == []
    assert propose_decisions(found, None, [Override(code="IMG201", where=small.where)]) == []


def test_size_is_held_against_the_base() -> None:
    sizes = [seen("300", 300), seen("700", 700), seen("1100", 1100)]
    for base, codes in ((64, []), (512, ["IMG201"]), (1024, ["IMG201", "IMG202"])):
        found = curate(sizes, CurationLimits(base_px=base, block_pictures=0, warn_pictures=0))
        assert sorted(one.code for one in found) == codes

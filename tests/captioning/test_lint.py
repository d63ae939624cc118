"""Caption lint: every code on a caption that has the fault, and silence on one that has not."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lint_examples import marked, of, rendered, texts
from long_caption import BOLIVANTE

from captioning import Fixed, Replace, Seen
from captioning.edits import Corrections
from captioning.lint import CODES, lint

GOOD = "ayatok, woman, red coat, smile, portrait, white background, sketch"


def test_a_good_caption_gives_nothing():
    findings, _, _ = texts(GOOD)
    assert findings == []


@pytest.mark.parametrize(
    ("code", "text", "where"),
    [
        ("CAP101", "woman, ayatok, red coat", "woman"),
        ("CAP101", "red coat, smile", "red coat"),
        ("CAP101", "ayatok woman, red coat", "ayatok woman"),
        ("CAP102", "ayatok, woman, ayatok smiling", "ayatok"),
        ("CAP103", "ayatok, woman, ayatk smiling", "ayatk"),
        ("CAP103", "Ayatok, woman, red coat", "Ayatok"),
        ("CAP113", "ayatok, woman, 红色 eyes", "红色"),
        ("CAP113", "ayatok, woman, кожаная jacket", "кожаная"),
        ("CAP114", "ayatok, woman, (red eyes:1.3)", "(red eyes:1.3)"),
        ("CAP115", "ayatok, woman\nred coat", "\n"),
        ("CAP118", "ayatok, I'm sorry, but I can't describe this image.", None),
        ("CAP118", "ayatok, white, black, white, black, white, black, white, black, white", None),
        ("CAP119", "ayatok, a woman in the rain with an umbrella and a", "a"),
        ("CAP121", "ayatok, woman, beautiful red coat", "beautiful"),
        ("CAP121", "ayatok, woman, the prettiest coat", "prettiest"),
        ("CAP121", "ayatok, woman, best quality, coat", "best quality"),
        ("CAP122", "ayatok, a woman who appears to be smiling, possibly outdoors", "possibly"),
        ("CAP123", "ayatok, woman, gray coat", "gray coat"),
        ("CAP126", "ayatok, woman, red hair, blue hair", "blue hair"),
        ("CAP132", "ayatok, woman, hat, boots", "boots"),
    ],
)
def test_each_fault_is_found_in_its_place(code, text, where):
    findings, captions, _ = texts(text)
    found = of(code, findings)
    assert found, findings
    if where is not None:
        assert where in [marked(one, captions) for one in found]
    assert of(code, texts(GOOD)[0]) == []


@pytest.mark.parametrize(
    "text",
    [
        "ayatok, woman, naïve café façade",  # accents are Latin
        "ayatok, woman, saber (fate), 1girl",
        "ayatok, woman, cute-looking",  # only whole words
        "ayatok, a woman looks into the mirror and sees the rain, with her coat on the chair",
    ],
)
def test_what_only_looks_like_a_fault_is_none(text):
    findings, _, _ = texts(text)
    assert [one for one in findings if one.severity != "info"] == []


def test_a_trigger_misspelt_in_one_of_thirty_is_found():
    lines = [f"ayatok, woman, thing number {place}" for place in range(30)]
    lines[17] = "aytaok, woman, thing number 17"
    findings, captions, _ = texts(*lines)
    assert [one.where for one in of("CAP103", findings)] == ["17"]
    assert [one.where for one in of("CAP101", findings)] == ["17"]
    assert marked(of("CAP103", findings)[0], captions) == "aytaok"


def test_words_of_the_vocabulary_are_no_misspelt_trigger():
    assert of("CAP103", texts("ayatok, woman", "smila, woman", trigger="smila")[0]) == []
    findings, _, _ = texts("smila, woman, smile", trigger="smila")
    assert of("CAP103", findings) == []
    seen = Seen({"ayatoc": 0.9})
    assert of("CAP103", texts("ayatok, woman, ayatoc", seen=seen)[0]) == []


@pytest.mark.parametrize("trigger", ["woman2", "smile", "rose"])
def test_a_trigger_that_means_something_else_is_said_once(trigger):
    findings, _, _ = texts(*[f"{trigger}, woman, red coat"] * 3, trigger=trigger)
    assert len(of("CAP104", findings)) == 1


def test_bolivantes_list_of_76_tokens_is_reported_with_the_lost_words():
    scores = {tag: 0.9 - place / 1000 for place, tag in enumerate(BOLIVANTE.split(", "))}
    findings, _, _ = rendered([Seen(scores)], intrinsic="keep")
    (found,) = of("CAP111", findings)
    assert found.limit == 75 and found.value == 2
    assert "white skin, pale skin" in found.message
    unread, _, _ = texts(f"ayatok, woman, {BOLIVANTE}")
    assert of("CAP112", unread)[0].value == 81


def test_emphasis_is_fine_where_the_trainer_reads_it():
    assert of("CAP114", texts("ayatok, (red eyes:1.3)", weight_syntax=True)[0]) == []


def test_prose_that_is_empty_or_refused_is_no_caption():
    for prose, code in (
        ("", "CAP116"),
        ("I'm sorry, I cannot describe people.", "CAP118"),
        ("a woman, white, white, white, white, white, white", "CAP118"),
        ("a woman with a hat and the", "CAP119"),
    ):
        findings, _, _ = rendered([Seen({}, prose)], form="prose")
        assert [one.code for one in findings if one.severity == "block"] == [code]
    findings, _, _ = rendered([Seen({})])
    assert of("CAP117", findings) and not [one for one in findings if one.severity == "block"]


@pytest.mark.parametrize(
    ("tags", "prose", "contradiction"),
    [
        ({"red coat": 0.9}, "a woman in a blue coat", "blue coat"),
        ({"red coat": 0.9}, "a woman in a long dark green coat", "green coat"),
        ({"solo": 0.9}, "two women in the rain", "two women"),
        ({"2girls": 0.9}, "a woman alone in the rain", "alone"),
        ({"sitting": 0.9}, "a woman standing in the rain", "standing"),
        ({"red coat": 0.9}, "a woman in a red coat and blue shoes", None),
        ({"red coat": 0.9}, "a woman in a red and blue coat", None),
        ({"blonde hair": 0.9}, "a woman with golden hair", None),
        ({"red coat": 0.2}, "a woman in a blue coat", None),
        ({"1girl": 0.9, "2girls": 0.4}, "two girls in the rain", None),
    ],
)
def test_tags_and_prose_that_contradict_one_another(tags, prose, contradiction):
    findings, captions, _ = rendered([Seen(tags, prose)], form="prose")
    places = [marked(one, captions) for one in of("CAP125", findings)]
    if contradiction is None:
        assert places == []
    else:
        assert len(places) == 1 and contradiction in of("CAP125", findings)[0].message
        assert places[0] in prose


def test_a_fixed_tag_that_the_tagger_does_not_see():
    pictures = [Seen({"earrings": 0.9, "hat": 0.9}), Seen({"hat": 0.9}), Seen({"earrings": 0.06})]
    fixed = (Fixed(tag="earrings", scope="always"), Fixed(tag="moon pin", scope="always"))
    findings, captions, _ = rendered(pictures, fixed=fixed)
    # nothing is said of `moon pin`: no tagger here knows the word
    assert [(one.where, marked(one, captions)) for one in of("CAP134", findings)] == [
        ("1", "earrings")
    ]


def test_a_fixed_tag_missing_in_a_caption_by_hand():
    fixed = (Fixed(tag="gold earrings"), Fixed(tag="red boots"))
    findings, _, _ = texts("ayatok, woman, hat, portrait", fixed=fixed)
    assert [one.limit for one in of("CAP131", findings)] == ["gold earrings"]  # no boots to be seen


def test_a_rule_that_undoes_another_is_left_unapplied():
    chain = (
        Replace(any=("bun",), remove=("bun",), add=("knot",)),
        Replace(any=("topknot",), remove=("topknot",), add=("bun",)),
    )
    findings, captions, _ = rendered([Seen({"topknot": 0.9})], replace=chain, intrinsic="keep")
    assert [marked(one, captions) for one in of("CAP133", findings)] == ["bun"]
    good, _, _ = rendered([Seen({"topknot": 0.9})], replace=chain[1:], intrinsic="keep")
    assert of("CAP133", good) == []
    # what a rule added and the drop policy took away is not undone
    dropped, _, _ = rendered([Seen({"wig": 0.9})], replace=(Replace(any=("wig",), add=("bun",)),))
    assert of("CAP133", dropped) == []


def test_overlaps_are_asked_for():
    line = "ayatok, woman, kimono, red kimono"
    assert of("CAP135", texts(line)[0]) == []
    findings, captions, _ = texts(line, overlaps=True)
    assert [marked(one, captions) for one in of("CAP135", findings)] == ["kimono"]


def test_what_a_caption_says_nothing_on():
    findings, _, _ = texts("ayatok, woman, red coat")
    assert {one.limit for one in of("CAP141", findings)} == {"scene", "style"}
    assert {one.limit for one in of("CAP142", findings)} == {"expression", "background"}
    behind, _, _ = texts("ayatok, woman, from behind, red coat, street")
    assert of("CAP142", behind) == []  # no face to be seen
    close, _, _ = texts("ayatok, woman, close-up, smile, white background")
    assert of("CAP142", close) == []  # no clothes to be seen
    prose, _, _ = rendered([Seen({}, "a woman smiling on a street in a red coat")], form="prose")
    assert of("CAP142", prose) == []


def test_a_trait_in_most_captions_leaks():
    line = "ayatok, woman, pink hair, thing {}"
    findings, _, _ = texts(*[line.format(place) for place in range(4)], "ayatok, woman, other")
    (found,) = of("CAP151", findings)
    assert found.value == "pink hair" and len(found.others) == 4
    for rules in ({"keep": ("pink hair",)}, {"intrinsic": "keep"}):
        kept, _, _ = texts(*[line.format(place) for place in range(5)], **rules)
        assert of("CAP151", kept) == []
    prose = [Seen({}, f"a woman with pink hair and thing {place}") for place in range(5)]
    assert of("CAP151", rendered(prose, form="prose")[0])[0].value == "pink hair"


def test_a_tag_on_all_pictures_that_is_never_sure():
    pictures = [Seen({"sparkles": 0.4, f"thing {place}": 0.9}) for place in range(5)]
    findings, _, _ = rendered(pictures, intrinsic="keep")
    assert [one.value for one in of("CAP152", findings)] == [0.4]
    sure = [Seen({"sparkles": 0.6, f"thing {place}": 0.9}) for place in range(5)]
    assert of("CAP152", rendered(sure, intrinsic="keep")[0]) == []


def test_captions_that_are_nearly_the_same():
    many = ", ".join(f"thing {word}" for word in "abcdefghijklmnopqrs")
    lines = [f"ayatok, woman, {many}, x", f"ayatok, woman, {many}", "ayatok, woman, other"]
    findings, _, _ = texts(*lines, max_tokens=300)
    (found,) = of("CAP153", findings)
    assert (found.where, found.others) == ("0", ("1",))


def test_a_misspelt_tag_beside_its_right_spelling():
    lines = [*["ayatok, woman, leather jaket"], *["ayatok, woman, leather jacket"] * 3]
    findings, captions, _ = texts(*lines)
    assert [marked(one, captions) for one in of("CAP124", findings)] == ["leather jaket"]
    # what the tagger says is spelt right, however alike
    seen = Seen({"leather jaket": 0.9})
    assert of("CAP124", texts(*lines, seen=seen)[0]) == []


def test_findings_do_not_depend_on_the_captions_order():
    lines = [GOOD, "woman, ayatok", "ayatok, woman, pink hair", "Ayatok, I'm sorry", GOOD]
    findings, captions, aya = texts(*lines)
    assert lint(captions[::-1], aya) == findings
    assert [one.severity for one in findings] == sorted(
        (one.severity for one in findings), key=["block", "warn", "info"].index
    )


def test_every_code_is_documented():
    table = (Path(__file__).parents[2] / "docs" / "captions.md").read_text()
    for code, kind in CODES.items():
        assert f"| {code} | {kind.severity} |" in table, code


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=80), max_size=5))
def test_any_text_is_linted_and_places_lie_in_it(lines):
    findings, captions, _ = texts(*lines)
    for one in findings:
        if one.start is not None:
            text = captions[int(one.where)].caption.text
            assert 0 <= one.start < one.end <= len(text) or not text


def test_a_person_who_adds_a_rival_is_told():
    human = {"0": Corrections(added=("red hair", "blue hair"))}
    findings, captions, _ = rendered([Seen({"hat": 0.9})], human)
    assert [marked(one, captions) for one in of("CAP126", findings)] == ["red hair"]

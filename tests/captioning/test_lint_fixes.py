"""lint --fix: edits that mend what needs no look at the picture, and only that."""

import pytest
from lint_examples import of, rendered, texts

from captioning import Fixed, Replace, Seen, render_all
from captioning.edits import corrections
from captioning.lint import Captioned, fixes, lint


def mended(findings, captions, aya):
    """(what is found after the fixes, the texts) when the fixes are recorded and rendered."""
    human = corrections(fixes(findings, captions, aya))
    pictures = {one.image: one.seen for one in captions}
    done = render_all(pictures, aya, human)
    again = [Captioned(image, done[image], seen) for image, seen in pictures.items()]
    return lint(again, aya), [one.caption.text for one in again]


@pytest.mark.parametrize(
    ("code", "text", "after"),
    [
        ("CAP101", "woman, ayatok, red coat", "ayatok, woman, red coat"),
        ("CAP102", "ayatok, woman, ayatok, red coat", "ayatok, woman, red coat"),
        ("CAP103", "ayatok, woman, ayatk, red coat", "ayatok, woman, red coat"),
        ("CAP114", "ayatok, woman, (red coat:1.3)", "ayatok, woman, red coat"),
        ("CAP115", "ayatok, woman,\nred coat", "ayatok, woman, red coat"),
        ("CAP121", "ayatok, woman, stunning red coat", "ayatok, woman, red coat"),
        ("CAP123", "ayatok, woman, gray coat", "ayatok, woman, grey coat"),
        ("CAP132", "ayatok, woman, hat, boots", "ayatok, woman, boots, hat"),
    ],
)
def test_a_text_is_mended(code, text, after):
    findings, captions, aya = texts(text)
    assert of(code, findings)
    left, (line,) = mended(findings, captions, aya)
    assert line == after and of(code, left) == []


def test_rendered_captions_are_mended_by_tags():
    pictures = [Seen({"cute hat": 0.9, "horns": 0.9, "earrings": 0.9}), Seen({"coat": 0.9})]
    rules = {
        "fixed": (Fixed(tag="earrings", scope="always"),),
        "intrinsic": "keep",
        "replace": (
            Replace(any=("antlers",), remove=("antlers",), add=("pin",)),
            Replace(any=("horns",), remove=("horns",), add=("antlers",)),
        ),
    }
    findings, captions, aya = rendered(pictures, **rules)
    assert {"CAP121", "CAP133", "CAP134"} <= {one.code for one in findings}
    left, lines = mended(findings, captions, aya)
    assert not {"CAP121", "CAP133", "CAP134"} & {one.code for one in left}
    assert lines == ["ayatok, woman, earrings, hat, pin", "ayatok, woman, coat"]


def test_a_leak_and_a_misspelt_tag_are_mended_everywhere():
    lines = [f"ayatok, woman, pink hair, leather jacket, thing {place}" for place in range(4)]
    lines.append("ayatok, woman, pink hair, leather jaket, thing 9")
    findings, captions, aya = texts(*lines)
    left, after = mended(findings, captions, aya)
    assert not {"CAP124", "CAP151"} & {one.code for one in left}
    assert after[0] == "ayatok, woman, leather jacket, thing 0"
    assert after[4] == "ayatok, woman, leather jacket, thing 9"


def test_a_missing_fixed_tag_is_put_after_the_trigger():
    findings, captions, aya = texts("ayatok, woman, hat", fixed=(Fixed(tag="gold earrings"),))
    _, (line,) = mended(findings, captions, aya)
    assert line == "ayatok, gold earrings, woman, hat"


def test_what_needs_a_look_gets_no_edit():
    for text in ("ayatok, woman, red hair, blue hair", "ayatok, woman, 红色"):
        findings, captions, aya = texts(text)
        assert {one.code for one in findings} & {"CAP126", "CAP113"}
        assert fixes(of("CAP126", findings) + of("CAP113", findings), captions, aya) == []
    contradiction = [Seen({"red coat": 0.9}, "a woman in a blue coat")]
    assert fixes(*rendered(contradiction, form="prose")) == []

"""What changed between two versions, down to the word."""

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from captioning import DatasetVersion, ModelUsed, Sample
from captioning.version_diff import diff_versions, marked, word_changes


def sample(name: str, caption: str) -> Sample:
    return Sample(name * 64, Path(f"{name}.png"), caption, 64, 64, f"{name}.png")


def version(number: int, train: str, holdout: str = "", **fields) -> DatasetVersion:
    samples = [tuple(sample(one, f"ayatok, {one}") for one in split) for split in (train, holdout)]
    made = DatasetVersion(f"v{number:04d}-0", Path(), "aya", "ayatok", "woman", *samples, "0" * 64)
    return replace(made, **fields)


def names(samples: tuple[Sample, ...]) -> str:
    return "".join(one.sha256[0] for one in samples)


def test_images_in_and_out_and_between_the_splits():
    diff = diff_versions(version(2, "abc", "de"), version(3, "bdf", "cg"))
    assert (diff.before, diff.after) == ("v0002-0", "v0003-0")
    assert (names(diff.images_in), names(diff.images_out)) == ("fg", "ae")
    assert (names(diff.to_holdout), names(diff.to_train)) == ("c", "d")
    assert diff.captions == diff.settings == ()


def test_equal_versions_differ_in_nothing():
    diff = diff_versions(version(2, "abc", "d"), version(2, "abc", "d"))
    found = {name: value for name, value in vars(diff).items() if name not in ("before", "after")}
    assert found and not any(found.values())


def test_captions_rules_and_models():
    before = version(
        1,
        "a",
        rules={"threshold": 0.35, "order": {"body": True}, "drop": ["x"]},
        models=(ModelUsed("tags", "wd", "1"), ModelUsed("prose", "blip", "1")),
    )
    after = version(
        2,
        "",
        class_word="girl",
        rules={"threshold": 0.5, "order": {"body": True}, "drop": ["x", "y"], "new": 1},
        models=(ModelUsed("tags", "wd", "2"), ModelUsed("prose", "blip", "1")),
    )
    before = replace(before, train=(sample("a", "ayatok, red eyes, smile"),))
    after = replace(after, train=(sample("a", "ayatok, red hair, big smile"),))
    diff = diff_versions(before, after)
    assert marked(diff.captions[0].pieces) == "ayatok, red [-eyes-] {+hair+}, {+big+} smile"
    assert [(one.name, one.before, one.after) for one in diff.settings] == [
        ("class_word", "woman", "girl"),
        ("rules.threshold", 0.35, 0.5),
        ("rules.drop", ["x"], ["x", "y"]),
        ("rules.new", None, 1),
    ]
    assert (diff.models_in, diff.models_out) == ((after.models[0],), (before.models[0],))


CAPTIONS = st.lists(
    st.sampled_from(["red", "hair", "eyes", "smile", ",", "(", ")", "ayatok"]), max_size=12
)


@given(before=CAPTIONS, after=CAPTIONS)
def test_the_pieces_hold_both_captions(before: list[str], after: list[str]):
    pieces = word_changes(" ".join(before), " ".join(after))

    def words(without: str) -> str:
        kept = " ".join(text for kind, text in pieces if kind != without)
        return kept.replace(",", " , ").split()

    assert words("in") == before
    assert words("out") == after

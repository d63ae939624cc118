"""What rules may say: every wrong field is named, with the nearest right one."""

import csv
from collections import Counter

import pytest
from long_caption import BOLIVANTE

from captioning import STARTER_TAGGER, Rules, UserError, parse_config
from captioning.lexicon import lexicon
from captioning.lexicon.names import plain_tag, split_weight, without_weights


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"treshold": 0.4}, "did you mean 'threshold'"),
        ({"threshold": 0.01}, "threshold: 0.01"),
        ({"thresholds": {"wd": 2}}, "wd: 2.0 is not in"),
        ({"form": "haiku"}, "form: 'haiku'"),
        ({"intrinsic_share": 0.3}, "intrinsic_share: 0.3"),
        ({"order": ["head"]}, "must name each of these once"),
        ({"weights": {"red eyes": 0}}, "red eyes: 0.0 is not over 0"),
        ({"replace": [{"remove": ["horns"]}]}, "in `all` or `any`"),
        ({"replace": [{"any": ["horns"]}]}, "in `remove` or `add`"),
        ({"replace": [{"when": ["horns"]}]}, r"replace.0.when: unknown key"),
        ({"fixed": [{"tag": "horns", "scope": "never"}]}, "fixed.0.scope"),
    ],
)
def test_wrong_rules_are_named(data, problem):
    with pytest.raises(UserError, match=problem):
        parse_config(Rules, data, "character.yaml")


def test_the_threshold_is_the_taggers_own_unless_the_rules_say_otherwise():
    assert Rules().threshold_of("wd-swinv2-tagger-v3") == 0.2653
    assert Rules().threshold_of("SmilingWolf--wd-eva02-large-tagger-v3") == 0.5296
    assert Rules().threshold_of("anything else") == 0.35
    assert Rules(threshold=0.4).threshold_of("wd-swinv2-tagger-v3") == 0.4
    assert Rules(threshold=0.4, thresholds={"mine": 0.6}).threshold_of("mine") == 0.6


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("Long_Hair", "long hair"),
        ("^_^", "^_^"),
        ("a,b", "a b"),
        (" blue \n sky ", "blue sky"),
        ("\x00", ""),
    ],
)
def test_a_tag_has_one_spelling(tag, name):
    assert plain_tag(tag) == name == plain_tag(name)


def test_emphasis_is_taken_apart_from_the_tag():
    assert split_weight("(red eyes:1.3)") == ("red eyes", 1.3)
    assert split_weight("((red eyes:.5))") == ("red eyes", 0.5)
    assert split_weight("saber (fate)") == ("saber (fate)", None)
    assert without_weights("a (red eyes:1.3), saber (fate)") == "a red eyes, saber (fate)"


def test_no_word_stands_in_two_groups_and_every_rank_is_known():
    groups = lexicon().groups
    for field in ("tags", "begins", "ends"):
        counts = Counter(word for group in groups for word in getattr(group, field))
        assert [word for word, count in counts.items() if count > 1] == []
    for group in groups:
        assert group.rank in lexicon().order
        for word in (*group.tags, *group.hidden_by):
            assert plain_tag(word) == word
        for tag in group.tags:
            assert tag not in lexicon().synonyms, f"{tag} is not the canonical name"


def test_every_word_of_the_starter_tagger_has_a_group():
    with (STARTER_TAGGER / "selected_tags.csv").open(newline="") as file:
        tags = [plain_tag(row["name"]) for row in csv.DictReader(file) if row["category"] != "9"]
    assert [tag for tag in tags if lexicon().group(tag).group == "other"] == []
    meant = {
        "far view": "framing",
        "pink hair": "hair",
        "hat": "outfit",
        "sad": "expression",
        "micah style": "style",
    }
    assert {tag: lexicon().group(tag).slot for tag in meant} == meant


def test_bolivantes_list_is_already_in_the_shipped_order():
    tags = BOLIVANTE.split(", ")
    order = lexicon().order
    assert sorted(tags, key=lambda tag: order.index(lexicon().group(tag).rank)) == tags


@pytest.mark.parametrize(
    ("tag", "slot", "trait"),
    [
        ("silver hair", "hair", True),
        ("hair ornament", "outfit", False),
        ("wet hair", "pose", False),
        ("closed eyes", "expression", False),
        ("looking at viewer", "gaze", False),
        ("holding sword", "pose", False),
        ("unheard of", "other", False),
    ],
)
def test_a_tag_is_known_by_its_name_its_first_or_its_last_words(tag, slot, trait):
    group = lexicon().group(tag)
    assert (group.slot, group.trait) == (slot, trait)

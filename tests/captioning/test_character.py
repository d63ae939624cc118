import pytest

from captioning import (
    Character,
    Rules,
    Store,
    UserError,
    add_character,
    latest_dataset,
    list_characters,
    list_dataset_versions,
    load_captions,
    load_character,
    make_character,
)

BAD_NAMES = ["../aya", "a/b", "/etc/passwd", "..", "", "Aya", "a b", "a" * 65, "aya\n", "-aya", "á"]


def test_a_character_comes_back_as_it_was(store: Store):
    rules = Rules(threshold=0.5, form="tags+prose", drop=("watermark", "日本"))
    aya = Character(name="aya", trigger="ayatok", class_word="young woman", rules=rules)
    add_character(store, aya)
    assert load_character(store, "aya") == aya
    assert list_characters(store) == ["aya"]


def test_only_what_differs_from_the_defaults_is_written(store: Store, aya: Character):
    add_character(store, aya)
    written = (store.characters / "aya" / "character.yaml").read_text()
    assert written == "name: aya\ntrigger: ayatok\nclass_word: woman\n"


def test_adding_again_replaces_the_rules(store: Store, aya: Character):
    add_character(store, aya)
    add_character(store, aya.model_copy(update={"rules": Rules(max_tags=3)}))
    assert load_character(store, "aya").rules.max_tags == 3


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_leave_the_store_is_refused(store: Store, name: str):
    with pytest.raises(UserError, match=r"name.*lower-case letters"):
        make_character(name, "ayatok", "woman")
    for read in (load_character, load_captions, latest_dataset, list_dataset_versions):
        with pytest.raises(UserError, match="not a name"):
            read(store, name)


@pytest.mark.parametrize(
    "trigger", ["", "two words", "a,b", "tab\there", "bell\a", "woman", "WOMAN"]
)
def test_a_trigger_is_one_word_of_its_own(trigger: str):
    with pytest.raises(UserError, match="trigger"):
        make_character("aya", trigger, "woman")


@pytest.mark.parametrize("words", ["", "  ", "woman, girl", "a\nb"])
def test_a_class_word_has_no_commas_or_lines(words: str):
    with pytest.raises(UserError, match="class_word"):
        make_character("aya", "ayatok", words)


def test_an_unknown_character_is_answered_with_the_nearest(store: Store):
    with pytest.raises(UserError, match="there are none yet"):
        load_character(store, "aya")
    for name in ("aya", "miko"):
        add_character(store, Character(name=name, trigger=f"{name}tok"))
    with pytest.raises(UserError, match=r"known are aya, miko.*did you mean 'aya'"):
        load_character(store, "ayaa")


def test_a_rule_misspelt_by_hand_is_found(store: Store, aya: Character):
    add_character(store, aya.model_copy(update={"rules": Rules(threshold=0.4)}))
    file = store.characters / "aya" / "character.yaml"
    file.write_text(file.read_text().replace("threshold:", "treshold:"))
    with pytest.raises(UserError, match=r"rules\.treshold: unknown key; did you mean 'threshold'"):
        load_character(store, "aya")

"""render(): the steps one by one, in their documented order."""

import pytest
from long_caption import BOLIVANTE

from captioning import Caption, Character, Fixed, Replace, Rules, Seen, render, render_all
from captioning.edits import Corrections


def character(**rules) -> Character:
    return Character(name="aya", trigger="ayatok", class_word="woman", rules=Rules(**rules))


def caption(tags=None, prose="", human=None, intrinsic=frozenset(), tagger="", **rules) -> Caption:
    seen = Seen(tags or {}, prose, tagger)
    return render(seen, character(**rules), human or Corrections(), frozenset(intrinsic))


def text(*arguments, **named) -> str:
    return caption(*arguments, **named).text


def test_names_are_made_plain_and_the_better_score_of_two_spellings_counts():
    assert text({"Blue_Sky": 0.4, "blue sky": 0.9, "tree": 0.5}) == "ayatok, woman, blue sky, tree"


def test_the_threshold_counts_itself_and_is_the_taggers_own():
    tags = {"tree": 0.5, "grass": 0.4999}
    assert text(tags, threshold=0.5) == "ayatok, woman, tree"
    assert text({"tree": 0.3}, tagger="wd-swinv2-tagger-v3") == "ayatok, woman, tree"
    assert text({"tree": 0.3}, tagger="other") == "ayatok, woman"


def test_names_of_known_characters_are_off_unless_wanted():
    seen = Seen({"hatsune miku": 0.99, "tree": 0.9}, characters=frozenset({"hatsune miku"}))
    assert render(seen, character()).text == "ayatok, woman, tree"
    wanted = render(seen, character(character_threshold=0.85)).text
    assert wanted == "ayatok, woman, hatsune miku, tree"


def test_dropped_tags_stay_out_and_say_so():
    done = caption({"watermark": 0.99, "tree": 0.8}, drop=("Watermark",))
    assert done.text == "ayatok, woman, tree"
    assert [(one.tag, one.why) for one in done.removed] == [("watermark", "on the drop list")]


def test_one_name_for_one_thing():
    assert text({"cg artwork": 0.9, "gray jacket": 0.8}) == (
        "ayatok, woman, grey jacket, digital painting"
    )
    mine = {"digital painting": "cg artwork"}
    assert text({"digital art": 0.9}, synonyms=mine) == "ayatok, woman, cg artwork"


def test_replace_rules_change_tags_in_order_and_count_their_hits():
    rules = (
        Replace(
            all=("long hair", "ponytail"),
            remove=("long hair", "ponytail", "high ponytail"),
            add=("hair bun", "single hair bun"),
        ),
        Replace(any=("horns", "antlers"), remove=("horns", "antlers"), add=("hair ornament",)),
        Replace(any=("wings",), add=("feathers",)),
    )
    tags = {"long hair": 0.9, "ponytail": 0.6, "high ponytail": 0.5, "horns": 0.8}
    done = render(Seen(tags), character(replace=rules, intrinsic="keep"))
    assert done.text == "ayatok, woman, hair ornament, hair bun, single hair bun"
    assert done.hits == (0, 1)
    assert render(Seen({"ponytail": 0.9}), character(replace=rules, intrinsic="keep")).hits == ()


def keep_or(policy, tags, intrinsic=(), **rules) -> str:
    return render(
        Seen(tags), character(intrinsic=policy, **rules), intrinsic=frozenset(intrinsic)
    ).text


def test_intrinsic_traits_are_dropped_kept_or_fixed():
    tags = {"red hair": 0.9, "green eyes": 0.8, "hat": 0.7, "smile": 0.6}
    assert keep_or("drop", tags) == "ayatok, woman, hat, smile"
    assert keep_or("keep", tags) == "ayatok, woman, red hair, green eyes, hat, smile"
    assert keep_or("drop", tags, {"hat"}) == "ayatok, woman, smile"
    assert keep_or("drop", tags, keep=("green eyes",)) == "ayatok, woman, green eyes, hat, smile"
    assert keep_or("drop", tags, traits=("hat",)) == "ayatok, woman, smile"
    assert keep_or("fixed", {"hat": 0.7}, {"red hair"}) == "ayatok, woman, red hair, hat"


def test_a_tag_on_most_pictures_is_a_trait_but_never_what_belongs_to_the_picture():
    scores = {"purple armor": 0.9, "smile": 0.9, "white background": 0.9}
    pictures = {str(row): Seen(scores | ({"tree": 0.9} if row % 2 else {})) for row in range(10)}
    pictures["0"] = Seen({"purple armor": 0.1, "smile": 0.9})  # hidden once: 90 % is enough
    texts = [one.text for one in render_all(pictures, character(), {}).values()]
    assert texts[1] == "ayatok, woman, smile, tree, white background"
    assert not any("armor" in one for one in texts)
    few = {key: pictures[key] for key in "123"}
    assert "armor" in render_all(few, character(), {})["1"].text  # three prove nothing


def test_of_tags_that_exclude_one_another_the_best_stays():
    keep = {"intrinsic": "keep"}
    tags = {"red hair": 0.9, "blue hair": 0.6, "portrait": 0.7, "full body": 0.5}
    assert render(Seen(tags), character(**keep)).text == "ayatok, woman, red hair, portrait"
    mixed = {**tags, "multicolored hair": 0.8}
    assert "blue hair" in render(Seen(mixed), character(**keep)).text
    own = character(exclusive=(("cat", "dog"),))
    assert render(Seen({"cat": 0.5, "dog": 0.6}), own).text == "ayatok, woman, dog"


def test_fixed_tags_come_first_where_they_can_be_seen():
    fixed = (Fixed(tag="red boots"), Fixed(tag="gold earrings", scope="always"))
    body = {"full body": 0.9, "hat": 0.8}
    assert text(body, fixed=fixed) == "ayatok, woman, red boots, gold earrings, hat, full body"
    face = {"portrait": 0.9, "hat": 0.8}
    assert text(face, fixed=fixed) == "ayatok, woman, gold earrings, hat, portrait"
    eyes = (Fixed(tag="golden eyes"),)
    assert text({"from behind": 0.9}, fixed=eyes) == "ayatok, woman, from behind"
    assert text({"tree": 0.9}, fixed=eyes) == "ayatok, woman, golden eyes, tree"


def test_a_fixed_trait_outlives_the_drop_policy_and_its_rivals():
    fixed = (Fixed(tag="red hair"),)
    assert text({"red hair": 0.5, "blue hair": 0.9}, fixed=fixed) == "ayatok, woman, red hair"


def test_body_tags_run_from_feet_to_head_and_equal_ranks_by_score():
    tags = {"hat": 0.99, "boots": 0.5, "skirt": 0.6, "shirt": 0.7, "scarf": 0.8, "coat": 0.9}
    assert text(tags) == "ayatok, woman, boots, skirt, coat, shirt, scarf, hat"
    shown = BOLIVANTE.split(", ")[:14]
    scores = {tag: 0.9 - place / 100 for place, tag in enumerate(shown)}
    assert text(scores, max_tokens=200) == "ayatok, woman, " + ", ".join(shown)


def test_the_order_can_be_the_characters_own():
    order = tuple(reversed(character().rules.order or _shipped_order()))
    assert text({"boots": 0.5, "hat": 0.4}, order=order) == "ayatok, woman, hat, boots"


def _shipped_order():
    from captioning.lexicon import lexicon

    return lexicon().order


def test_trigger_and_class_word_never_come_twice():
    tags = {"ayatok": 0.9, "Woman": 0.8, "ayatok dress": 0.7}
    assert text(tags) == "ayatok, woman, dress"
    said = "Ayatok smiles at ayatok's cat."
    assert text({}, said, form="prose") == "ayatok, woman, woman smiles at woman's cat"


def test_the_form_chooses_the_template():
    tags = {"smile": 0.9, "outdoors": 0.8, "sunlight": 0.7, "photo (medium)": 0.6, "1girl": 0.5}
    prose = " A woman\nsmiles outdoors. "
    assert text(tags, prose, form="tags") == (
        "ayatok, woman, 1girl, smile, outdoors, sunlight, photo (medium)"
    )
    assert text(tags, prose, form="prose") == "ayatok, woman, A woman smiles outdoors"
    assert text({"smile": 0.9}, prose, form="tags+prose") == (
        "ayatok, woman, smile, A woman smiles outdoors"
    )
    # the sentence says `outdoors` already; `smile` is no matter of camera, light or style
    assert text(tags, prose, form="prose+tags") == (
        "ayatok, woman, A woman smiles outdoors. sunlight, photo (medium)"
    )


def test_the_four_part_form_is_subject_attributes_scene_style():
    # the example of the four-part formula, as tags
    tags = {
        "cyberpunk": 0.99,
        "rainy street": 0.98,
        "night": 0.97,
        "red eyes": 0.96,
        "leather jacket": 0.95,
        "1girl": 0.94,
        "mystery": 0.93,
    }
    assert render(Seen(tags), character(form="four-part", intrinsic="keep")).text == (
        "ayatok, woman, 1girl, leather jacket, red eyes, mystery, rainy street, night, cyberpunk"
    )


def test_a_paragraph_stays_one_line():
    prose = "A woman.\n\nShe smiles.\r\n\u2028She waves.\x0b"
    assert text({}, prose, form="prose") == "ayatok, woman, A woman. She smiles. She waves"


def test_what_does_not_fit_is_lost_from_the_least_sure_and_reported():
    tags = BOLIVANTE.split(", ")
    scores = {tag: 0.9 - place / 1000 for place, tag in enumerate(tags)}
    done = render(Seen(scores), character(intrinsic="keep"))
    assert done.tokens <= done.limit == 75
    assert done.lost == ("white skin", "pale skin")
    assert done.text.endswith("hair bun, lipstick, black lips")


def test_fixed_tags_are_never_lost():
    fixed = tuple(Fixed(tag=f"fixed number {word}", scope="always") for word in "abcdef")
    done = caption({"tree": 0.9, "hat": 0.5}, fixed=fixed, max_tokens=10)
    assert done.lost == ("hat", "tree")
    assert done.tags == done.fixed == tuple(f"fixed number {word}" for word in "abcdef")
    assert done.tokens > done.limit


def test_prose_is_cut_at_a_word_that_can_end_it():
    prose = "a woman in a red coat standing in the rain with an umbrella"
    done = caption({}, prose, form="prose", max_tokens=14)
    assert done.text == "ayatok, woman, a woman in a red coat standing"
    assert done.lost == ("in", "the", "rain", "with", "an", "umbrella")


def test_emphasis_is_written_only_for_trainers_that_read_it():
    tags = {"hat": 0.9, "saber (fate)": 0.8}
    weights = {"hat": 1.3}
    plain, weighted = (
        caption(tags, weights=weights, weight_syntax=syntax) for syntax in (False, True)
    )
    assert plain.text == "ayatok, woman, hat, saber (fate)"
    assert weighted.text == r"ayatok, woman, (hat:1.3), saber \(fate\)"
    assert plain.tokens == weighted.tokens


def test_emphasis_that_a_person_typed_is_kept_as_a_number():
    from captioning.edits import Edit, corrections

    edits = [Edit(image="x", action="add", value="(red scarf:1.3)")]
    human = corrections(edits)["x"]
    assert text({}, human=human) == "ayatok, woman, red scarf"
    assert text({}, human=human, weight_syntax=True) == "ayatok, woman, (red scarf:1.3)"
    typed = Corrections(caption="a woman with (red eyes:1.3)")
    assert text({}, human=typed) == "ayatok, a woman with red eyes"
    assert text({}, human=typed, weight_syntax=True) == "ayatok, a woman with (red eyes:1.3)"


def test_a_persons_tags_win_over_the_model_and_the_rules():
    human = Corrections(added=("green eyes", "Blue_Hat"), removed=frozenset({"tree", "grey sky"}))
    tags = {"red eyes": 0.99, "tree": 0.9, "gray sky": 0.8, "hat": 0.7}
    assert text(tags, human=human) == "ayatok, woman, blue hat, green eyes, hat"
    fixed = (Fixed(tag="red boots"),)
    off = Corrections(removed=frozenset({"red boots"}))
    assert text({}, human=off, fixed=fixed) == "ayatok, woman"


def test_a_removed_tag_sets_off_no_rule():
    rule = (Replace(any=("horns",), add=("demon",)),)
    off = Corrections(removed=frozenset({"horns"}))
    assert text({"horns": 0.9}, human=off, replace=rule) == "ayatok, woman"


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("ayatok, a woman in the rain", "ayatok, a woman in the rain"),
        ("Ayatok walks with ayatok", "ayatok, walks with woman"),
        ("a woman,\nwalking", "ayatok, a woman, walking"),
    ],
)
def test_a_persons_caption_follows_the_trigger_as_it_is(typed, shown):
    done = caption({"tree": 0.9}, human=Corrections(caption=typed))
    assert done.text == shown and done.by_hand


def test_a_persons_long_caption_is_cut_and_the_words_are_reported():
    done = caption(human=Corrections(caption=BOLIVANTE))
    assert done.tokens <= 75
    assert done.lost == ("skin,", "white", "skin")

"""What holds for every caption, whatever the models say and people type."""

from hypothesis import assume, given
from hypothesis import strategies as st

from captioning import Character, Fixed, Replace, Rules, Seen, render, render_all
from captioning.edits import Edit, corrections
from captioning.lexicon.names import plain_tag
from captioning.tokens import load_encoder

TRIGGER = "ayatok"
any_text = st.text(st.characters(codec="utf-8"), max_size=12)
TRICKY = "smile;Smile;ayatok;Ayatok dress;woman;a,b; ;blue  sky;line\nbreak;red hair;blue hair"
TRICKY += ";portrait;full body;boots;gray hat;cg artwork;(red eyes:1.3);(a:0.5);_;^_^;ayatok's"
words = any_text | st.sampled_from(TRICKY.split(";"))
plain_words = words.filter(lambda word: bool(plain_tag(word)))
scores = st.dictionaries(words, st.floats(0, 1), max_size=10)
replaces = st.builds(
    Replace,
    any=st.lists(words, min_size=1, max_size=2).map(tuple),
    remove=st.lists(words, min_size=1, max_size=2).map(tuple),
    add=st.lists(words, max_size=2).map(tuple),
)
rule_sets = st.builds(
    Rules,
    threshold=st.none() | st.floats(0.05, 1),
    form=st.sampled_from(["tags", "prose", "tags+prose", "prose+tags", "four-part"]),
    drop=st.lists(words, max_size=3).map(tuple),
    max_tags=st.integers(1, 8),
    intrinsic=st.sampled_from(["keep", "drop", "fixed", None]),
    replace=st.lists(replaces, max_size=2).map(tuple),
    fixed=st.lists(st.builds(Fixed, tag=plain_words), max_size=2).map(tuple),
    synonyms=st.dictionaries(words, words, max_size=2),
    weights=st.dictionaries(words, st.floats(0.5, 1.5), max_size=2),
    weight_syntax=st.booleans(),
    max_tokens=st.none() | st.integers(1, 30),
)
edits = st.lists(
    st.builds(
        Edit,
        image=st.just("x"),
        action=st.sampled_from(["add", "remove", "leave"]),
        value=plain_words.filter(lambda word: bool(plain_tag(word.strip("()")))),
    )
    | st.builds(
        Edit,
        image=st.just("x"),
        action=st.sampled_from(["prose", "caption"]),
        value=st.text(st.characters(codec="utf-8"), max_size=60) | words,
    ),
    max_size=4,
)


def character(rules: Rules) -> Character:
    return Character(name="aya", trigger=TRIGGER, class_word="woman", rules=rules)


@given(
    tags=scores,
    prose=st.text(st.characters(codec="utf-8"), max_size=60) | words,
    rules=rule_sets,
    changes=edits,
    intrinsic=st.frozensets(words.map(plain_tag), max_size=3),
)
def test_trigger_first_and_once_one_line_within_the_limit(tags, prose, rules, changes, intrinsic):
    aya = character(rules)
    human = corrections(changes).get("x", corrections([]).get("x"))
    arguments = [human] if human else []
    done = render(Seen(tags, prose), aya, *arguments, intrinsic=intrinsic)
    assert done.text.splitlines() == [done.text]
    assert done.text.startswith(TRIGGER)
    assert done.text.lower().replace(",", " ").split().count(TRIGGER) == 1
    encoder = load_encoder("clip", rules.max_tokens)
    bare = ", ".join([TRIGGER, "woman", *done.fixed])
    assert done.tokens <= max(done.limit, encoder.count(bare))
    assert not rules.weight_syntax or done.tokens <= encoder.count(done.text)
    again = render(Seen(dict(reversed(tags.items())), prose), aya, *arguments, intrinsic=intrinsic)
    assert again == done
    if rules.form in ("tags", "four-part") and not done.by_hand and not rules.weight_syntax:
        parts = done.text.split(", ")
        assert all(part == " ".join(part.split()) and part for part in parts)
        assert len(set(parts)) == len(parts)
        assert len(parts) <= 2 + len(done.fixed) + rules.max_tags


@given(tags=scores, rules=rule_sets, intrinsic=st.frozensets(words.map(plain_tag), max_size=3))
def test_rendering_a_captions_own_tags_changes_nothing(tags, rules, intrinsic):
    """Two exceptions: rules that build on one another's output, which lint names (CAP133), and
    other framing than in the picture, cut by the limit or fixed: it decides what is in view."""
    aya = character(rules.model_copy(update={"replace": ()}))
    first = render(Seen(tags), aya, intrinsic=intrinsic)
    weights = {tag: 1 - place / 100 for place, tag in enumerate(_best_first(first.tags, tags, aya))}
    always = rules.model_copy(update={"replace": (), "threshold": 0.05})
    again = render(Seen(weights), character(always), intrinsic=intrinsic)
    assume(again.fixed == first.fixed)
    assert again.tags == first.tags


def _best_first(shown, tags, aya):
    """The caption's tags by the score they had; fixed ones, which may have none, first."""
    from captioning.render_tags import Ready

    ready = Ready(aya)
    best = {}
    for tag, score in tags.items():
        name = ready.name(tag)
        best[name] = max(best.get(name, 0), score)
    return sorted(shown, key=lambda tag: (-best.get(tag, 2), tag))


@given(tags=scores, low=st.floats(0.05, 1), high=st.floats(0.05, 1))
def test_a_higher_threshold_never_adds_a_tag(tags, low, high):
    low, high = sorted((low, high))
    many, few = (
        render(Seen(tags), character(Rules(threshold=at, intrinsic="keep"))).tags
        for at in (low, high)
    )
    assert set(few) <= set(many)


@given(pictures=st.lists(scores, max_size=6), rules=rule_sets)
def test_a_set_does_not_depend_on_its_order(pictures, rules):
    named = {str(place): Seen(tags) for place, tags in enumerate(pictures)}
    turned = dict(reversed(named.items()))
    aya = character(rules)
    assert render_all(named, aya, {}) == render_all(turned, aya, {})

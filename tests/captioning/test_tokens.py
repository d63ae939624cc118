"""Token counts by the real tokenizer: of CLIP, shipped, and of others by path."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from long_caption import BOLIVANTE

from captioning import UserError
from captioning.tokens import CLIP_TOKENIZER, load_encoder


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("a photo of a cat", 5),
        (BOLIVANTE, 76),
        ("red eyes", 2),
        ("(red eyes:1.3)", 8),
        ("一个可爱的动漫女孩站在霓虹灯雨夜街头微笑", 52),
    ],
)
def test_clip_counts_what_clip_reads(text: str, tokens: int):
    assert load_encoder().count(text) == tokens


def test_clip_reads_75_tokens_unless_told_otherwise():
    assert load_encoder().limit == 75
    assert not load_encoder().fits(BOLIVANTE)
    assert load_encoder("clip", 150).fits(BOLIVANTE)


@given(st.text(max_size=60))
def test_counting_word_by_word_equals_counting_the_text(text: str):
    whole = load_encoder("clip")._tokenizer.encode(text, add_special_tokens=False)
    assert load_encoder("clip").count(text) == len(whole.ids)


def test_the_shipped_tokenizer_is_what_transformers_reads():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(CLIP_TOKENIZER)
    # OpenAI's own ids for this sentence, as its README shows them being made
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer.model_max_length == 77


def make_t5(folder: Path, longest: int | None) -> Path:
    """A tokenizer of T5's kind: sentence pieces, an end token, no start token."""
    from transformers import T5Tokenizer

    letters = "abcdefghijklmnopqrstuvwxyz,▁"
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((letter, -2.0) for letter in letters),
    ]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    if longest:
        tokenizer.model_max_length = longest
    tokenizer.save_pretrained(folder)
    return folder


def test_another_encoder_comes_by_path_with_its_own_limit(tmp_path: Path):
    encoder = load_encoder(str(make_t5(tmp_path / "t5", 40)))
    assert encoder.limit == 39  # one place is the end token's
    assert encoder.count("ab ab") == 6
    assert load_encoder(str(tmp_path / "t5"), 512).limit == 512


def test_an_encoder_that_knows_no_limit_needs_one(tmp_path: Path):
    source = str(make_t5(tmp_path / "t5", None))
    with pytest.raises(UserError, match=r"does not say how long.*rules\.max_tokens"):
        load_encoder(source)
    assert load_encoder(source, 512).limit == 512


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no tokenizer.*rules\.encoder"):
        load_encoder(str(tmp_path))

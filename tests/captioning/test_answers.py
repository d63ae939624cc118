"""Answers that must never become captions, from what models really say, and captions that may."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.observers.answers import cleaned, fault

REFUSALS = [
    "I'm sorry, but I can't assist with that request.",
    "I’m sorry, I cannot identify people in images.",
    "I am unable to describe this image.",
    "As an AI language model, I don't have the ability to see images.",
    "Sorry, I can't help with that.",
    "I cannot provide a description of this person's appearance.",
    "I don't see an image attached to your message.",
    "Could you please upload the image again?",
    "No image was provided.",
    "Unfortunately, the content is against our usage policies.",
    "This picture violates our content policy.",
    "I do not feel comfortable describing this.",
]
CAPTIONS = [
    "a portrait of a person with long pink hair, smiling, on a yellow background",
    "A woman in a red coat stands at a bus stop, looking at her phone.",
    "She is sitting on a bench and can't be seen fully because of the tree.",
    "A sign on the wall reads 'sorry, we are closed'.",
    "Two people apologise to each other in a comic panel.",
    "a man and a woman, a man with a hat, a woman with a bag",
    "The girl wears a red ribbon in her hair and a red ribbon on her dress.",
    "女の子が立っています。",
    "A robot, an AI assistant from a film, waves.",
]
LOOPS = [
    "white, black, white, black, white, black, white, black, white, black, white, black",
    "the woman is wearing a hat and the woman is wearing a hat and the woman is wearing a hat",
    "red red red red red red",
    "A cat. A cat sits here now. A cat sits here now. A cat sits here now.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text: str):
    assert fault(cleaned(text), ended=True) == "a refusal"


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_pass(text: str):
    assert fault(cleaned(text), ended=True) is None


@pytest.mark.parametrize("text", LOOPS)
def test_loops(text: str):
    assert fault(cleaned(text), ended=True) == "it repeats itself"
    assert fault(cleaned(text), ended=False) == "it repeats itself"


@pytest.mark.parametrize("text", ["", "  \n ", "...", '""', "<think>a girl?</think>"])
def test_empty_answers(text: str):
    assert fault(cleaned(text), ended=True) == "an empty answer"


def test_an_answer_that_was_stopped_is_cut_off_unless_its_sentence_is_complete():
    assert fault("A woman with a red", ended=False) == "cut off in the middle of a sentence"
    assert fault("A woman with a red hat.", ended=False) is None
    assert fault("a woman with a red hat", ended=True) is None  # BLIP sets no full stop


def test_thoughts_are_left_out_and_thinking_alone_is_no_answer():
    said = "<think>\nShe might be sad.\n</think>\n\nA girl looks\nout of a window."
    assert cleaned(said) == "A girl looks out of a window."
    assert fault(cleaned(said), ended=True) is None
    lost = "<think>Let me look at the picture. It shows"
    assert fault(cleaned(lost), ended=False) == "it thought until it was cut off"


@given(st.text(max_size=300), st.booleans())
def test_a_caption_that_passes_is_one_line_with_words(text: str, ended: bool):
    line = cleaned(text)
    assert cleaned(line) == line and "\n" not in line
    if fault(line, ended) is None:
        assert any(character.isalnum() for character in line)


@given(st.lists(st.sampled_from("abcdefghij"), min_size=4, max_size=4), st.integers(3, 9))
def test_four_words_three_times_over_are_a_loop(words: list[str], times: int):
    assert fault(" ".join(words * times), ended=True) == "it repeats itself"

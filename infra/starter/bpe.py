"""The starter's own small BPE vocabulary in CLIP's format.

Every byte is in it, alone and at a word's end, so that any word can be spelled: a trigger that
nobody has seen becomes a few tokens of its own.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import captions
from avatars import Avatar
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

END_OF_WORD = "</w>"
MERGES = 400  # enough for every word of the captions to be one token
MAX_LENGTH = 77  # CLIP's
START, END = "<|startoftext|>", "<|endoftext|>"


def train(avatars: list[Avatar], work: Path) -> CLIPTokenizer:
    """Merges from the captions; saved as vocab.json and merges.txt by the tokenizer itself."""
    rng = random.Random(0)
    shapes = CLIPTokenizer().backend_tokenizer  # CLIP's own lower-casing and word splitting
    trained = Tokenizer(BPE(end_of_word_suffix=END_OF_WORD))
    trained.normalizer, trained.pre_tokenizer = shapes.normalizer, shapes.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=2 * len(alphabet) + MERGES,
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    sample = (captions.training_caption(avatar, rng) for avatar in avatars[:5000])
    trained.train_from_iterator(sample, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    words = alphabet + [letter + END_OF_WORD for letter in alphabet]
    words += [left + right for left, right in merges] + [START, END]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(work / "tokenizer")
    return tokenizer


def load(work: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(work / "tokenizer")

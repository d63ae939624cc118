"""Is what a language model said about a picture a caption? Text in, the reason against it out.

Pure. A refusal, an empty or cut-off answer and a loop must never become somebody's caption.
"""

from __future__ import annotations

import re
from collections import Counter

# The same 4 words three times over is a model in a loop; prose hardly repeats 4 words even twice.
LOOP_WORDS, LOOP_TIMES = 4, 3
# What one-word loops ("white, white, white, ...") come to in a row.
STUTTER_TIMES = 6
SENTENCE_END = (".", "!", "?", "…", '."', '!"', '?"', ".”", "!”", "?”", "。")
APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'"})

_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_OPEN_THOUGHT = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
# The speaker's own words; a caption has no "I".
_REFUSAL = re.compile(
    r"""
    \bas\ an?\ (?:ai|artificial|language|large)\b
  | \bi(?:'m|\ am)\ (?:(?:really|so|very)\ )?(?:sorry|afraid|unable)\b
  | \bi(?:'m|\ am)\ not\ (?:able|comfortable|going)\b
  | \bi\ (?:can(?:no|')?t|can\ not|could\ not|couldn't|won't|will\ not|must\ decline|decline)\b
  | \bi\ (?:do\ not|don't)\ (?:feel\ comfortable|see\ an?\ (?:image|picture|photo)|have\ access)\b
  | ^\s*(?:sorry|apologies|unfortunately|my\ apologies)\b
  | \b(?:violates?|against)\ (?:our|my|the)\b.{0,40}\b(?:polic(?:y|ies)|guidelines?)\b
  | \b(?:please|could\ you|can\ you)\ (?:\w+\ )?(?:provide|upload|share|attach)\b
  | \bno\ image\ (?:was|is|has\ been)\ (?:provided|attached|uploaded|given)\b
  | \bcan(?:no|')?t\ (?:assist|help)\ with\ (?:that|this)\b
    """,
    re.IGNORECASE | re.VERBOSE,
)


class AnswerError(ValueError):
    """The model's answer is no caption; the message says why and shows how it begins."""


def cleaned(text: str) -> str:
    """One line, without the thoughts that some models show before the answer."""
    return " ".join(_THOUGHT.sub(" ", text).split())


def fault(text: str, ended: bool) -> str | None:
    """Why `text`, as `cleaned` gives it, is no caption; None when it may be one.

    `ended` is false when the model was stopped at its longest answer.
    """
    if _OPEN_THOUGHT.search(text):
        return "it thought until it was cut off"
    if not any(character.isalnum() for character in text):
        return "an empty answer"
    if _REFUSAL.search(text.translate(APOSTROPHES)):
        return "a refusal"
    if _loops(text):
        return "it repeats itself"
    if not ended and not text.endswith(SENTENCE_END):
        return "cut off in the middle of a sentence"
    return None


def refuse(text: str, reason: str) -> AnswerError:
    """The error for an answer with a fault."""
    return AnswerError(f"{reason}: {text[:60]!r}" if text else reason)


def _loops(text: str) -> bool:
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.casefold().translate(APOSTROPHES))
    runs = Counter(tuple(words[at : at + LOOP_WORDS]) for at in range(len(words) - LOOP_WORDS + 1))
    if any(count >= LOOP_TIMES for count in runs.values()):
        return True
    return any(
        len(set(words[at : at + STUTTER_TIMES])) == 1
        for at in range(len(words) - STUTTER_TIMES + 1)
    )

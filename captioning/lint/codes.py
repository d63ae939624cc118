"""The codes of caption lint. A code is never given another meaning, and never used again.

`block`: training on it would be wasted or wrong. `warn`: it costs quality. `info`: worth a look.
"""

from __future__ import annotations

from typing import NamedTuple

from captioning.findings import Severity


class Code(NamedTuple):
    """How bad, what it is, and what to do about it."""

    severity: Severity
    title: str
    hint: str


CODES: dict[str, Code] = {
    "CAP101": Code("block", "the trigger is not first", "render again, or put it first"),
    "CAP102": Code("block", "the trigger stands more than once", "leave only the first"),
    "CAP103": Code("block", "the trigger is misspelt", "correct or remove the word"),
    "CAP104": Code("warn", "the trigger is no rare word", "take a made-up word of letters"),
    "CAP111": Code("warn", "words were lost to the token limit", "drop tags, or raise max_tokens"),
    "CAP112": Code("block", "longer than the encoder reads", "shorten trigger and fixed tags"),
    "CAP113": Code("block", "letters that are not Latin", "translate it into English"),
    "CAP114": Code("warn", "emphasis that the trainer takes for words", "use rules.weights"),
    "CAP115": Code("block", "more than one line", "trainers read only the first: join the lines"),
    "CAP116": Code("block", "no prose, where the form wants some", "caption it again, or write it"),
    "CAP117": Code(
        "warn", "nothing but trigger and class word", "lower the threshold, or add tags"
    ),
    "CAP118": Code("block", "no caption but a model's failure", "caption it again, or write it"),
    "CAP119": Code("block", "the sentence was cut off", "caption it again, or write its end"),
    "CAP121": Code("warn", "an adjective that shows nothing", "remove it, or say what is seen"),
    "CAP122": Code("warn", "the model guesses", "say it plainly, or leave it out"),
    "CAP123": Code("info", "another name for the same thing", "use one name everywhere"),
    "CAP124": Code("warn", "looks like a misspelt tag", "correct it"),
    "CAP125": Code(
        "warn", "tags and prose contradict one another", "look, and correct one of them"
    ),
    "CAP126": Code("warn", "tags that exclude one another", "look, and remove one"),
    "CAP131": Code("warn", "a fixed tag is missing", "add it"),
    "CAP132": Code("info", "not in the order of the other captions", "sort it"),
    "CAP133": Code(
        "warn", "a replace rule would still change it", "apply it, or reorder the rules"
    ),
    "CAP134": Code(
        "warn", "a fixed tag that the tagger does not see", "remove it from this picture"
    ),
    "CAP135": Code("info", "a tag that another one contains", "leave the longer one"),
    "CAP141": Code("info", "a part of the four-part caption is empty", "add a tag for it"),
    "CAP142": Code(
        "info", "the caption does not tell it apart", "what is not said, the trigger learns"
    ),
    "CAP151": Code(
        "warn", "the character's own trait in most captions", "drop it, or list it in keep"
    ),
    "CAP152": Code(
        "warn", "on nearly all pictures, and never surely", "drop it, or check the tagger"
    ),
    "CAP153": Code("warn", "captions that are nearly the same", "say what differs"),
}

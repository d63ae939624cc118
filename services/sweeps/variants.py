"""What tells the trials of a sweep apart, in a few words: `lr 0.0003, no text_encoder`.

The searched fields of one combination in, words out. Method and rank are left out: they stand
before these words, wherever a trial is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Parts of a recipe whose fields are known by their own names.
SECTIONS = ("network.", "optimizer.", "schedule.")
NAMED_ALREADY = ("network.method", "network.rank")


def variant_words(search: Mapping[str, list[Any]], overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of `overrides`, one combination of a search, that have several values in it."""
    return tuple(
        word
        for field, value in overrides.items()
        if len(search[field]) > 1
        for word in _words(field, value)
    )


def _words(field: str, value: Any) -> Iterator[str]:
    if field in NAMED_ALREADY:
        return
    name = field
    for section in SECTIONS:
        name = name.removeprefix(section)
    if isinstance(value, Mapping) and value:
        for inner, of_inner in value.items():
            yield from _words(f"{field}.{inner}", of_inner)
    elif value is None or value is False:
        yield f"no {name}"
    elif value is True or isinstance(value, Mapping):
        yield name
    elif name == "type":
        yield str(value)
    elif isinstance(value, list):
        yield f"{name} {'/'.join(map(str, value))}"
    else:
        yield f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"

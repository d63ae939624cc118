"""How dataset versions are named: `v0002-1a2b3c4d` on disk, `aya@v2` by people. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from captioning.character import plain
from captioning.errors import UserError

_NAME = re.compile(r"v(\d{4})-([0-9a-f]{8})")


def split_reference(reference: str) -> tuple[str, str]:
    """Character and version of `aya@v2`; the version is empty when only the character is named."""
    name, _, wanted = reference.partition("@")
    return plain(name), wanted


def choose_version(name: str, wanted: str, known: Sequence[str]) -> str:
    """The one of `known` (oldest first) that `wanted` means; the newest when it is empty.

    Raises UserError when there is none, or more than one.
    """
    if not wanted:
        return known[-1]
    number = re.fullmatch(r"v?(\d{1,4})", wanted)
    prefix = f"v{int(number[1]):04d}-" if number else wanted
    found = [one for one in known if one == prefix or (number and one.startswith(prefix))]
    if len(found) == 1:
        return found[0]
    state = f"versions {' and '.join(found)} are both" if found else "there is no version"
    raise UserError(f"{name}@{wanted}", f"{state} of that name", f"known are {', '.join(known)}")


def is_version_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None

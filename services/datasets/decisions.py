"""What people decide about pictures and findings: drop, keep, accept. Nothing is deleted."""

from __future__ import annotations

from dataclasses import dataclass

from captioning import (
    CODES,
    Decision,
    Image,
    Override,
    UserError,
    decide,
    find_image,
    kept_images,
    load_character,
    override,
)
from services.datasets.check import check_dataset
from services.farm.settings import Home


@dataclass(frozen=True)
class DecidedPicture:
    """One picture that was dropped or taken back in."""

    image: Image
    keep: bool
    kept: int  # how many pictures are in now


def decide_picture(
    home: Home, name: str, picture: str, keep: bool, reason: str = ""
) -> DecidedPicture:
    """Drop one picture from the versions made from now on, or take it back in.

    The `picture` is named by its source or by the first digits of its sha256.
    """
    image = find_image(home.store, name, picture)
    decide(home.store, name, [Decision(image=image.sha256, keep=keep, reason=reason)])
    return DecidedPicture(image, keep, len(kept_images(home.store, name)))


def drop_proposed(home: Home, name: str) -> tuple[Decision, ...]:
    """Drop the pictures that the check proposes to drop; gives the decisions that were kept."""
    proposed = check_dataset(home, name).proposed
    decide(home.store, name, proposed)
    return proposed


def override_finding(
    home: Home, name: str, code: str, picture: str | None = None, reason: str = ""
) -> Override:
    """Record that a person accepts a code, for one picture or for all of the character's.

    Raises UserError for a code that does not exist.
    """
    load_character(home.store, name)
    where = find_image(home.store, name, picture).sha256 if picture else ""
    accepted = Override(code=_known_code(code), where=where, reason=reason)
    override(home.store, name, accepted)
    return accepted


def _known_code(code: str) -> str:
    """The code itself; the curation's image codes (IMG...) are taken as they are."""
    if code in CODES or (code.startswith("IMG") and code[3:].isdigit() and len(code) == 6):
        return code
    raise UserError(
        f"code {code}", "there is no such code", "`lorafarm dataset lint` names those that it found"
    )

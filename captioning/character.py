"""A character: name, trigger, class word and caption rules, one folder each in the store."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from captioning.config import load_config, parse_config
from captioning.errors import UserError
from captioning.rules import Rules
from captioning.store import Store, write_atomic

CHARACTER_FILE = "character.yaml"
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
NAME_RULE = (
    "must be lower-case letters, digits, '-' or '_', begin with a letter or digit, "
    "and have at most 64 characters"
)


class Character(BaseModel):
    """One identity (or a style, or an object) that adapters are trained for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Lower-case letters, digits, - and _; names files and adapters.")
    trigger: str = Field(description="Activation token: one word, the first of every caption.")
    class_word: str = Field("person", description="What the character is, in the base's words.")
    rules: Rules = Field(default_factory=Rules, description="How captions are rendered.")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(NAME_RULE)
        return name

    @field_validator("trigger")
    @classmethod
    def _one_word(cls, trigger: str) -> str:
        if not trigger.isprintable() or re.search(r"[\s,]|^$", trigger):
            raise ValueError("must be one word without spaces or commas")
        return trigger

    @field_validator("class_word")
    @classmethod
    def _some_words(cls, words: str) -> str:
        if not words.strip() or "," in words or not words.isprintable():
            raise ValueError("must be a word or two on one line, without commas")
        return words.strip()

    @model_validator(mode="after")
    def _two_things(self) -> Self:
        if self.trigger.casefold() == self.class_word.casefold():
            raise ValueError(
                f"trigger and class_word are both {self.trigger!r}; the trigger must be a word "
                "that the base model does not know"
            )
        if self.trigger.casefold() in self.class_word.casefold().split():
            raise ValueError(f"class_word contains the trigger {self.trigger!r}")
        return self


def make_character(name: str, trigger: str, class_word: str) -> Character:
    """A character with default rules; raises UserError naming the bad field."""
    data = {"name": name, "trigger": trigger, "class_word": class_word}
    return parse_config(Character, data, "character")


def folder(store: Store, name: str) -> Path:
    """Where the character's own files are; raises UserError for a name that is no plain name."""
    return store.characters / plain(name)


def plain(name: str) -> str:
    """`name` itself; raises UserError when it could lead out of the store (`../x`, `a/b`)."""
    if not NAME_PATTERN.fullmatch(name):
        raise UserError(f"character {name!r}", "not a name", f"a name {NAME_RULE}")
    return name


def add_character(store: Store, character: Character) -> None:
    """Keep the character; adding the same name again replaces trigger, class word and rules."""
    # Defaults are left out: they come from the tagger and the base model's family.
    data = character.model_dump(mode="json", exclude_defaults=True)
    data |= {"class_word": character.class_word}
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    write_atomic(folder(store, character.name) / CHARACTER_FILE, text.encode())


def load_character(store: Store, name: str) -> Character:
    """Read a character back; raises UserError naming the nearest known one when there is none."""
    file = folder(store, name) / CHARACTER_FILE
    if file.exists():
        return load_config(Character, file)
    known = list_characters(store)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}? Or " if nearest else ""
    raise UserError(
        f"character {name}",
        f"not known; known are {', '.join(known)}" if known else "not known; there are none yet",
        f"{hint}add it with `lorafarm dataset add {name} <folder> --trigger <word>`",
    )


def list_characters(store: Store) -> list[str]:
    """Names of all characters, sorted."""
    if not store.characters.is_dir():
        return []
    return sorted(file.parent.name for file in store.characters.glob(f"*/{CHARACTER_FILE}"))

"""Typed config out of plain data or a YAML file, with errors that name the key and the fix.

Used by every room; the models forbid unknown keys, this file says which key was probably meant.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from captioning.errors import UserError

M = TypeVar("M", bound=BaseModel)
SHOWN_CHARACTERS = 80  # a message shows so much of a wrong value
# The C parser is nearly ten times as fast, and every command reads the lexicon.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_config(model: type[M], data: object, source: str) -> M:
    """Validate `data` as `model`.

    Raises UserError with one line per problem, such as `sweep.yaml: recipe.network.rank: 0 is ...`;
    an unknown key is answered with the nearest valid one.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_problem(model, dict(item)) for item in error.errors(include_url=False)]
        fix = "; ".join(dict.fromkeys(fix for _, fix in problems))
        raise UserError(source, "; ".join(text for text, _ in problems), fix) from error


def load_config(model: type[M], path: Path) -> M:
    """Read a YAML (or JSON) file as `model`; an empty file means all defaults.

    Raises UserError when the file is missing, is no YAML, or does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), "no readable YAML file", "check the path") from error
    try:
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UserError(
            str(path), f"not valid YAML{line}", "check indentation and quotes there"
        ) from error
    return parse_config(model, {} if data is None else data, str(path))


def _problem(model: type[BaseModel], error: dict[str, Any]) -> tuple[str, str]:
    """(what is wrong, how to fix it) for one of pydantic's errors."""
    location, models = _written(model, [str(part) for part in error["loc"]])
    dotted = ".".join(location) or "the file"
    if error["type"] != "extra_forbidden":
        value = "nothing" if error["type"] == "missing" else _short(error["input"])
        message = error["msg"].removeprefix("Value error, ")
        return f"{dotted}: {value}: {message}", f"correct {dotted}"
    valid = sorted({key for candidate in models for key in candidate.model_fields})
    nearest = difflib.get_close_matches(location[-1], valid, n=1)
    if nearest:
        return f"{dotted}: unknown key; did you mean {nearest[0]!r}?", f"write {nearest[0]!r}"
    return f"{dotted}: unknown key", f"use one of: {', '.join(valid)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _written(model: type[BaseModel], path: list[str]) -> tuple[list[str], list[type[BaseModel]]]:
    """The path as it is in the file, and the models that may have its last part as a key.

    pydantic's path names the tag of a union too, which nobody wrote there: it is left out, and
    decides for one model. Other parts that are no field (a list index, a dict key) stay.
    """
    here, written = [model], []
    for number, part in enumerate(path):
        tagged = [candidate for candidate in here if part in _literals(candidate)]
        if len(here) > 1 and tagged:
            here = tagged
            continue
        written.append(part)
        if number == len(path) - 1:
            break
        nested = [
            found
            for candidate in here
            if part in candidate.model_fields
            for found in _models(candidate.model_fields[part].annotation)
        ]
        here = nested or here
    return written, here


def _literals(model: type[BaseModel]) -> set[object]:
    """The values of the model's literal fields, by one of which a union tells it apart."""
    return {
        value
        for field in model.model_fields.values()
        if get_origin(field.annotation) is Literal
        for value in get_args(field.annotation)
    }


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside an annotation such as `list[Recipe] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]

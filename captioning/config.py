"""Typed config out of plain data or a YAML file, with errors that name the key and the fix.

Used by every room; the models forbid unknown keys, this file says which key was probably meant.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from captioning.errors import UserError

M = TypeVar("M", bound=BaseModel)
SHOWN_CHARACTERS = 80  # of a wrong value in a message


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
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UserError(
            str(path), f"not valid YAML{line}", "check indentation and quotes there"
        ) from error
    return parse_config(model, {} if data is None else data, str(path))


def _problem(model: type[BaseModel], error: dict[str, Any]) -> tuple[str, str]:
    """(what is wrong, how to fix it) for one of pydantic's errors."""
    location = [str(part) for part in error["loc"]]
    dotted = ".".join(location) or "the file"
    if error["type"] != "extra_forbidden":
        value = "nothing" if error["type"] == "missing" else _short(error["input"])
        message = error["msg"].removeprefix("Value error, ")
        return f"{dotted}: {value}: {message}", f"correct {dotted}"
    *parents, unknown = location
    valid = sorted(_keys(model, parents))
    nearest = difflib.get_close_matches(unknown, valid, n=1)
    if nearest:
        return f"{dotted}: unknown key; did you mean {nearest[0]!r}?", f"write {nearest[0]!r}"
    return f"{dotted}: unknown key", f"use one of: {', '.join(valid)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _keys(model: type[BaseModel], path: list[str]) -> set[str]:
    """The keys that are valid at `path` inside `model`.

    A part of the path that is no field (a list index, a dict key, a union's tag) is passed over.
    """
    here = [model]
    for part in path:
        nested = [
            found
            for candidate in here
            if part in candidate.model_fields
            for found in _models(candidate.model_fields[part].annotation)
        ]
        here = nested or here
    return {key for candidate in here for key in candidate.model_fields}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside an annotation such as `list[Recipe] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]

"""A commented sweep file with every field at its default, made from the fields' descriptions.

What a base's family decides stands in it as a comment: written out, one family's would be said to
all, and refused by some.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from functools import reduce

import yaml
from pydantic import BaseModel

from services.sweeps.plan import SweepConfig
from training import usual_recipes

WIDTH = 92
HEADER = """\
# A sweep: every combination of `search` is trained on top of `recipe`, each checkpoint is scored.
# Save as sweep.yaml, delete what you don't change, then:
# lorafarm sweep <character> --config sweep.yaml
"""
EXAMPLE_SEARCH = {"network.rank": [4, 16], "network.method": ["lora", "dora"]}


def commented_sweep() -> str:
    """YAML that parses as the default sweep, with an example search in place of the empty one."""
    config = SweepConfig(search=EXAMPLE_SEARCH)
    return HEADER + "\n".join(_lines(config, 0)) + "\n"


def _lines(model: BaseModel, depth: int, place: str = "") -> Iterator[str]:
    """The fields of `model`, which is at `place` (dotted, with a dot behind it) in the sweep."""
    indent = "  " * depth
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        of_families = _of_families(place + name)
        said = " ".join(filter(None, (field.description, of_families)))
        for line in textwrap.wrap(said, WIDTH - len(indent)):
            yield f"{indent}# {line}"
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _lines(value, depth + 1, f"{place}{name}.")
        else:
            text = textwrap.indent(_yaml({name: _plain(value)}), "# " if of_families else "")
            yield textwrap.indent(text, indent)


def _of_families(place: str) -> str:
    """What a field of the recipe is where it is left out, if that depends on the base's family."""
    field = place.removeprefix("recipe.")
    if field == place:
        return ""
    families: dict[str, list[str]] = {}
    for family, recipe in usual_recipes().items():
        value = reduce(getattr, field.split("."), recipe)
        if isinstance(value, BaseModel):
            return ""
        families.setdefault(_yaml(_plain(value)).removesuffix("\n..."), []).append(family)
    if len(families) == 1:
        return ""
    each = (f"{value} ({', '.join(names)})" for value, names in families.items())
    return f"Left out, it is the family's own: {'; '.join(each)}."


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=WIDTH).rstrip("\n")


def _plain(value: object) -> object:
    """Tuples as lists, which is what YAML has."""
    return list(value) if isinstance(value, tuple) else value

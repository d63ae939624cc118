"""A commented sweep file with every field at its default, made from the fields' descriptions."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import yaml
from pydantic import BaseModel

from services.sweep import SweepConfig

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


def _lines(model: BaseModel, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        for line in textwrap.wrap(field.description or "", WIDTH - len(indent)):
            yield f"{indent}# {line}"
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _lines(value, depth + 1)
        else:
            plain = {name: _plain(value)}
            text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=WIDTH)
            yield textwrap.indent(text.rstrip("\n"), indent)


def _plain(value: object) -> object:
    """Tuples as lists, which is what YAML has."""
    return list(value) if isinstance(value, tuple) else value

"""The base class of training's configs, which are strict and never change once parsed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Unknown keys and non-finite numbers are errors; a value never changes once it is parsed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

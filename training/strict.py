"""The base of the config classes of training: strict, and never changed once parsed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Unknown keys and non-finite numbers are errors; a value never changes once it is parsed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

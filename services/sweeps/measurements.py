"""What was measured on this machine: packs' steps and memory, and the scoring of a checkpoint.

Facts in, a key; a measurement in, kept in `measurements.json` of the home; read back by the key.
Never measures anything itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from captioning import UserError, write_atomic
from services.farm.settings import Home
from training import Measurement

FILE = "measurements.json"
# Part of every key: raise it when the same pack is computed in another way.
FORMAT = 1
PACKS, SCORING = "packs", "scoring"
Facts = Mapping[str, Any]


class MeasurementStore:
    """The measurements of a home."""

    def __init__(self, home: Home) -> None:
        self._path = home.path / FILE

    def pack(self, facts: Facts) -> Measurement | None:
        """What a pack took the last time; None if it was not measured. See `Estimator.facts`."""
        found = self._read(PACKS, facts)
        return Measurement(found["step_s"], found["peak_bytes"]) if found else None

    def keep_pack(self, facts: Facts, measured: Measurement) -> None:
        value = {"step_s": measured.step_s, "peak_bytes": measured.peak_bytes}
        self._write(PACKS, facts, value)

    def scoring(self, facts: Facts) -> float | None:
        """The seconds that a checkpoint's scoring took; None if none was scored here."""
        found = self._read(SCORING, facts)
        return float(found["seconds"]) if found else None

    def keep_scoring(self, facts: Facts, seconds: float) -> None:
        self._write(SCORING, facts, {"seconds": seconds})

    def _read(self, kind: str, facts: Facts) -> dict[str, Any] | None:
        return self._all()[kind].get(_key(facts))

    def _write(self, kind: str, facts: Facts, value: dict[str, Any]) -> None:
        content = self._all()
        # The facts lie beside the value, for people who look into the file.
        content[kind][_key(facts)] = {**value, "facts": dict(facts)}
        write_atomic(self._path, (json.dumps(content, indent=1) + "\n").encode())

    def _all(self) -> dict[str, dict[str, Any]]:
        empty: dict[str, dict[str, Any]] = {PACKS: {}, SCORING: {}}
        if not self._path.exists():
            return empty
        try:
            return empty | json.loads(self._path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                str(self._path), f"is not readable JSON ({error})", "delete it: it is made again"
            ) from error


def _key(facts: Facts) -> str:
    text = json.dumps([FORMAT, dict(facts)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]

"""The states of whatever the farm works on: jobs, sweeps, trials."""

from __future__ import annotations

from typing import Literal

#: `succeeded` needs an artefact that was read again; `cancelled` was stopped by a person.
State = Literal["queued", "running", "verifying", "succeeded", "failed", "cancelled"]

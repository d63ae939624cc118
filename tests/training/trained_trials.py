"""What a trained trial has left in its folder: its curve, its weights, its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from training.checkpoints import list_checkpoints, load_checkpoint


def rows(trial_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trial_dir / "metrics.jsonl").read_text().splitlines()]


def losses(trial_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(trial_dir)]


def last_adapter(trial_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(trial_dir)[-1].path).adapter


def steps_saved(trial_dir: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(trial_dir)]

"""Measures the base that is being trained beside the tree's, without touching the tree.

Comes in: a work folder with the pictures and the base's checkpoint, at any step. Goes out:
`compare.json`, and a sheet of generated pictures for each base, in the work folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import base_quality
import diffusion
import evaluate
import numpy as np
import pictures
import torch
from diffusers import StableDiffusionPipeline
from kept_out_error import kept_out_error


def compare(work: Path) -> None:
    """Both bases by the same prompts and seeds; the tree's is measured once for a work folder."""
    pixels, avatars = pictures.load(work, "val")
    pixels = np.asarray(pixels[: evaluate.MAX_PICTURES])
    avatars = avatars[: evaluate.MAX_PICTURES]
    trained, _ = pictures.load(work, "train")

    def measure(pipe: StableDiffusionPipeline, name: str) -> dict[str, object]:
        error = kept_out_error(pipe, pixels, avatars)
        print(f"{name}: kept-out error in fifths {error}", flush=True)
        sheet = work / f"generated-{name}.png"
        quality = base_quality.measure(pipe, pixels, avatars, trained, sheet)
        return rounded({"kept_out_error": error} | asdict(quality))

    file = work / "compare.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    if "tree" not in found:
        found["tree"] = measure(evaluate.pipeline(), "tree")
    step = diffusion.start(work).step
    # Rounded to fp16 and back, as a bundle of it would be.
    pipe = diffusion.pipeline(work).to(dtype=torch.float16).to(dtype=torch.float32)
    found[f"step {step}"] = measure(pipe, str(step))
    file.write_text(json.dumps(found, indent=1))
    for name, row in found.items():
        print(name, json.dumps(row), flush=True)


def rounded(measures: dict[str, object]) -> dict[str, object]:
    """The measures with four digits, as JSON has them."""
    return json.loads(json.dumps(measures), parse_float=lambda text: round(float(text), 4))

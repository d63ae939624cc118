"""Builds the starter models, stage by stage; a stage that was cut off goes on where it stood.

usage: python infra/starter/build.py [--work DIR] [--only STAGE ...] [--until STAGE]
       python infra/starter/build.py --work DIR --continue-base
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import adopt  # noqa: E402
import autoencoder  # noqa: E402
import bpe  # noqa: E402
import bundle  # noqa: E402
import captioner  # noqa: E402
import clip  # noqa: E402
import compare  # noqa: E402
import demo_pictures  # noqa: E402
import diffusion  # noqa: E402
import evaluate  # noqa: E402
import pictures  # noqa: E402
import tagger  # noqa: E402
import torch  # noqa: E402


def render(work: Path) -> None:
    pictures.install(work)
    pictures.render(work)


def train_tokenizer(work: Path) -> None:
    if not (work / "tokenizer").exists():
        bpe.train(pictures.load(work, "train")[1], work)


def write_latents(work: Path) -> None:
    if not (work / autoencoder.LATENTS).exists():
        autoencoder.write_latents(work)


def refine(work: Path) -> None:
    if not (work / autoencoder.REFINED).with_suffix(".done").exists():
        autoencoder.refine(work, 3000)
        autoencoder.write_refined_latents(work)


# In the order in which they need each other. Steps for a build with time; README.md says how many
# the weights in the tree had.
STAGES: dict[str, Callable[[Path], None]] = {
    "render": render,
    "tokenizer": train_tokenizer,
    "autoencoder": lambda work: autoencoder.train(work, 4000),
    "latents": write_latents,
    "clip": lambda work: clip.train(work, 600),
    "tagger": lambda work: tagger.train(work, 2000),
    "captioner": lambda work: captioner.train(work, 1500),
    "refine": refine,
    "sharpen": lambda work: autoencoder.sharpen(work, 4000),
    "diffusion": lambda work: diffusion.train(work, 60_000),
    "bundle": bundle.bundle,
    "demo-pictures": demo_pictures.draw,
    "evaluate": evaluate.evaluate,
}
# Stages that a build from nothing does without.
BESIDE: dict[str, Callable[[Path], None]] = {"adopt": adopt.adopt, "compare": compare.compare}
# What training the tree's base on takes.
CONTINUE = ("render", "adopt", "diffusion")
ALL = STAGES | BESIDE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="data and checkpoints")
    parser.add_argument("--only", nargs="+", choices=ALL, help="these stages and no others")
    parser.add_argument("--until", choices=STAGES, help="every stage up to this one")
    parser.add_argument(
        "--continue-base", action="store_true", help="train on from the base in the tree"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in chosen(options):
        started = time.monotonic()
        print(f"== {name}", flush=True)
        ALL[name](options.work.resolve())
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)


def chosen(options: argparse.Namespace) -> list[str]:
    """The stages to run, in the order in which they need each other."""
    if options.continue_base:
        return list(CONTINUE)
    if options.only:
        return [name for name in ALL if name in options.only]
    names = list(STAGES)
    return names[: names.index(options.until) + 1] if options.until else names


if __name__ == "__main__":
    main()

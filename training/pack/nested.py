"""Cuts an adapter with nested ranks at each of them: every cut is an ordinary, smaller checkpoint.

A checkpoint of the whole run in, the checkpoint of a cut out; `training.cuts` has the recipes of
both. A cut keeps the scale of the whole adapter (its alpha/rank), so it has exactly the numbers
that steps at its rank have trained. DyLoRA (Valipour et al. 2022) and Matryoshka representations
(Kusupati et al. 2022) are the models. A cut is never trained on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from training.pack.parts import DOWN, UP
from training.recipe import Recipe


def cut_adapter(adapter: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The first `rank` rows of every A and columns of every B; magnitudes as they are."""
    cut = {}
    for name, tensor in adapter.items():
        if name.endswith(f".{DOWN}.weight"):
            tensor = tensor[:rank]
        elif name.endswith(f".{UP}.weight"):
            tensor = tensor[:, :rank]
        cut[name] = tensor.contiguous()
    return cut


def write_cut(whole: Checkpoint, cut_dir: Path, recipe: Recipe) -> Checkpoint:
    """Write the checkpoint, cut as `recipe` (one of `cut_recipes`) says, to `cut_dir/step-NNNNNN/`.

    Raises OSError (a full disk) and leaves nothing.
    """
    contents = load_checkpoint(whole.path)
    adapter = cut_adapter(contents.adapter, recipe.network.rank)
    # There is no state, since no training goes on from a cut.
    return save_checkpoint(cut_dir, whole.step, recipe, adapter, {}, contents.step_samples)

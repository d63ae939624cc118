"""An adapter of nested ranks, cut at each of them: an ordinary checkpoint of the smaller rank.

A recipe or a checkpoint of the whole run in, those of a cut out. The whole adapter's scale is kept
(alpha/rank of the whole), so what is cut is what a step at that rank has trained, number for
number; DyLoRA (Valipour et al. 2022) and Matryoshka representations (Kusupati et al. 2022) are the
models. A cut is never trained on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from training.pack.parts import DOWN, UP
from training.recipe import Network, Recipe


def cut_recipes(recipe: Recipe) -> tuple[Recipe, ...]:
    """What names the cuts of a run, by rising rank; none where there are no nested ranks.

    Its rank and alpha are the cut's; `network.nested_ranks` still says what it is cut from.
    """
    ranks = recipe.network.nested_ranks or ()
    return tuple(
        recipe.model_copy(update={"network": cut_network(recipe.network, rank)})
        for rank in ranks[:-1]
    )


def cut_network(network: Network, rank: int) -> Network:
    """The network of the first `rank` ranks; its alpha makes its scale that of the whole."""
    share = rank / network.rank
    if network.rank_stabilised:
        share = share**0.5
    alpha, conv_alpha = network.effective_alpha * share, network.conv_alpha
    text = network.text_encoder
    if text is not None and text.alpha is not None:
        text = text.model_copy(update={"alpha": text.alpha * share})
    return network.model_copy(
        update={
            "rank": rank,
            "alpha": alpha,
            "conv_alpha": None if conv_alpha is None else conv_alpha * share,
            "text_encoder": text,
        }
    )


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
    """The checkpoint cut as `recipe`, one of `cut_recipes`, says, in `cut_dir/step-NNNNNN/`.

    Raises OSError (a full disk) and leaves nothing.
    """
    contents = load_checkpoint(whole.path)
    adapter = cut_adapter(contents.adapter, recipe.network.rank)
    # No state: nobody goes on from a cut.
    return save_checkpoint(cut_dir, whole.step, recipe, adapter, {}, contents.step_samples)

"""The recipes of an adapter of nested ranks, cut at each of them.

The recipe of the whole run in, those of its cuts out. `training.nested` cuts the weights. Nothing
here imports torch.
"""

from __future__ import annotations

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

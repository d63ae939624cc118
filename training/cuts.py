"""The recipes of the smaller adapters that are cut out of an adapter with nested ranks.

The recipe of the whole run in, the recipes of its cuts out. `training.pack.nested` cuts the
weights. Nothing here imports torch.
"""

from __future__ import annotations

from training.recipe import Network, Recipe


def cut_recipes(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipes that name the cuts of a run, by rising rank; empty without nested ranks.

    Rank and alpha are the cut's; `network.nested_ranks` still says what it is cut from.
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

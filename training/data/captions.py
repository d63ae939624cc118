"""The variants of a caption that are encoded too: other orders of its tags, and no trigger.

Text in, text out. Pure: the same caption always comes in the same orders, so that all trials share
what is encoded.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from training.recipe import Recipe

SEPARATOR = ", "


@dataclass(frozen=True)
class CaptionPlan:
    """Which variants of every caption are encoded; trials with equal plans share them."""

    orders: int = 1  # how many orders of the tags, the written one included
    kept: int = 0  # how many tags at the front stay in place
    without_trigger: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> CaptionPlan:
        """The plan that a recipe asks for."""
        kept = recipe.kept_tags if recipe.tag_orders > 1 else 0
        asks_the_base = recipe.prior_weight > 0 and recipe.class_pictures is None
        return cls(recipe.tag_orders, kept, asks_the_base)


def tag_orders(caption: str, count: int, kept: int) -> tuple[str, ...]:
    """`count` orders of a caption's tags: the written one, then random ones.

    The first `kept` tags stay where they are (kohya's shuffle_caption and keep_tokens). The same
    order may come twice if there are few tags.
    """
    tags = caption.split(SEPARATOR)
    front, rest = tags[:kept], tags[kept:]
    orders = [caption]
    for number in range(1, count):
        digest = hashlib.sha256(f"{number}/{caption}".encode()).digest()
        shuffled = random.Random(digest).sample(rest, len(rest))
        orders.append(SEPARATOR.join([*front, *shuffled]))
    return tuple(orders)


def without_trigger(caption: str, trigger: str) -> str:
    """The caption for anybody of the class: the trigger is left out where it is a tag or a word."""
    tags = [tag for tag in caption.split(SEPARATOR) if tag.strip() != trigger]
    words = [" ".join(w for w in tag.split() if w != trigger) for tag in tags]
    return SEPARATOR.join(text for text in words if text)

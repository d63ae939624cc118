"""Which samples an optimiser step sees, and every random number that goes with them.

Randomness is counted, not carried: each draw is a function of (seed, step, place), where the
place is that of a sample in the whole step. So nothing has to be saved to resume, and the draws are
the same however the step is split into micro-batches and workers. All samples of a step are of one
bucket, which follows from the step alone: all trials on a dataset have the same at the same step.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.latents import LatentCache
from training.objective import Objective
from training.recipe import Recipe

# The stream of random numbers for class pictures.
CLASS_STREAM = "class/"


@dataclass(frozen=True)
class Batch:
    """B samples on the CPU, fp32."""

    images: tuple[int, ...]  # index into the cache
    posterior_samples: Tensor  # (B, C, h, w), raw VAE latents
    noise: Tensor  # (B, C, h, w), standard normal, plus the recipe's offset
    timesteps: Tensor  # (B,), as the objective draws them
    conditions: dict[str, Tensor]  # what the denoiser is given of text and picture, (B, ...) each
    prior_conditions: dict[str, Tensor]  # likewise without the trigger, if the cache has that
    # The texts of these conditions, if the recipe trains the text encoders.
    captions: tuple[str, ...]
    prior_captions: tuple[str, ...]
    masks: Tensor  # (B, 1, h, w), how much of each latent cell's picture is opaque, 0..1


def places_of(recipe: Recipe, micro_step: int, rank: int, world_size: int) -> range:
    """The places that worker `rank` trains in micro-batch `micro_step` of a step.

    Over all micro-steps and ranks these are 0..samples_per_step-1, each once. For a recipe from
    `shared_out` there may be later ones, which must not count.
    """
    first = (micro_step * world_size + rank) * recipe.batch_size
    return range(first, first + recipe.batch_size)


def shared_out(recipe: Recipe, step_samples: int, world_size: int) -> Recipe:
    """The recipe with the batch size and accumulation with which so many workers compute a step.

    `step_samples` are those of the workers that `batch_size` was written for: with as many workers
    the recipe is returned as it is. Batches are never larger, and divide the step; the workers
    compute as few samples one after the other as that allows. Where the batches cannot be dealt out
    evenly, some workers have one less in the last micro-step.
    """

    def rounds(size: int) -> int:
        return math.ceil(step_samples / (size * world_size))

    sizes = [size for size in range(1, recipe.batch_size + 1) if step_samples % size == 0]
    best = min(sizes, key=lambda size: (rounds(size) * size, -size))
    return recipe.model_copy(update={"batch_size": best, "accumulation": rounds(best)})


def draw_batch(
    recipe: Recipe,
    cache: LatentCache,
    step: int,
    places: Sequence[int],
    step_samples: int,
    objective: Objective,
    stream: str = "",
) -> Batch:
    """Draw the samples at `places` of optimiser step `step` (0-based), which has `step_samples`.

    The pictures of the step's bucket come in a fresh random order every epoch, each once per epoch.
    Batches of other pictures at the same places have a `stream` of draws of their own
    (`CLASS_STREAM`).
    """
    number, earlier = bucket_of_step(cache.counts, step)
    bucket = cache.buckets[number]
    images, latents, noises, timesteps, conditions = [], [], [], [], []
    priors, masks = [], []
    captions: list[str] = []
    prior_captions: list[str] = []
    for place in places:
        position = earlier * step_samples + place
        row = _row_at(stream, recipe.seed, number, position, len(bucket.images))
        generator = _generator(f"{stream}sample", recipe.seed, step, place)
        timestep = objective.draw_timestep(recipe, generator, bucket.mean.shape[-3:])
        choices = torch.rand(2, generator=generator)  # caption kept or not, mirrored or not
        view = int(choices[1] * bucket.mean.shape[1])
        mean, logvar = bucket.mean[row, view], bucket.logvar[row, view]  # (C, h, w)
        spread = torch.randn(mean.shape, generator=generator)
        image = bucket.images[row]
        images.append(image)
        latents.append(mean + torch.exp(0.5 * logvar) * spread)
        noise = torch.randn(mean.shape, generator=generator)
        if recipe.noise_offset:
            channels = torch.randn(len(mean), 1, 1, generator=generator)
            noise = noise + recipe.noise_offset * channels
        noises.append(noise)
        timesteps.append(timestep)
        dropped = bool(choices[0] < recipe.caption_dropout)
        order = 0
        if cache.orders > 1:
            order = int(torch.randint(cache.orders, (), generator=generator))
        said = None if dropped else order
        conditions.append(cache.conditions(image, said))
        priors.append(cache.prior_conditions(image))
        if recipe.network.text_encoder is not None:
            captions.append("" if said is None else cache.captions[image][said])
            prior_captions += cache.prior_captions[image : image + 1]
        masks.append(bucket.mask[row, view])
    return Batch(
        images=tuple(images),
        posterior_samples=torch.stack(latents),
        noise=torch.stack(noises),
        timesteps=torch.stack(timesteps),
        conditions=_stacked(conditions),
        prior_conditions=_stacked(priors),
        captions=tuple(captions),
        prior_captions=tuple(prior_captions),
        masks=torch.stack(masks),
    )


def drawn_rank(recipe: Recipe, step: int) -> int | None:
    """The rank that optimiser step `step` (0-based) trains, each of `network.nested_ranks` alike.

    DyLoRA (Valipour et al. 2022) with a uniform distribution. None where there are no such ranks.
    """
    ranks = recipe.network.nested_ranks
    if ranks is None:
        return None
    generator = _generator("rank", recipe.seed, step)
    return ranks[int(torch.randint(len(ranks), (), generator=generator))]


def bucket_of_step(counts: Sequence[int], step: int) -> tuple[int, int]:
    """The bucket of step `step` (0-based), and how many steps before it had the same.

    `counts` are the pictures of every bucket, N in all. In every N steps a bucket of n pictures has
    exactly n steps, so that each picture is seen equally often. It has one step in each n-th part
    of the N, at a random place (stratified sampling), so it waits for at most about 2N/n steps.
    """
    turn, place = divmod(step, sum(counts))
    order = _turn(tuple(counts), turn)
    number = order[place]
    return number, turn * counts[number] + order[:place].count(number)


@functools.lru_cache(maxsize=32)
def _turn(counts: tuple[int, ...], turn: int) -> tuple[int, ...]:
    """The buckets of the N steps of one turn, in order."""
    moments = []
    for number, count in enumerate(counts):
        places = torch.rand(count, generator=_generator("bucket", turn, number)).tolist()
        moments += [((part + place) / count, number) for part, place in enumerate(places)]
    return tuple(number for _, number in sorted(moments))


def of_one_shape(batches: Sequence[Batch]) -> list[list[int]]:
    """The indices of the batches, grouped by the shape of their latents; ascending."""
    alike: dict[torch.Size, list[int]] = {}
    for index, batch in enumerate(batches):
        alike.setdefault(batch.noise.shape, []).append(index)
    return list(alike.values())


def _stacked(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _row_at(stream: str, seed: int, bucket: int, position: int, count: int) -> int:
    """The row at `position` of a bucket's endless sequence of shuffled epochs."""
    epoch, place = divmod(position, count)
    # The first bucket, the only one where all pictures are squares, keeps the draws that it had
    # before there were others.
    own = (bucket,) if bucket else ()
    order = torch.randperm(count, generator=_generator(f"{stream}order", seed, epoch, *own))
    return int(order[place])


def _generator(purpose: str, *counters: int) -> torch.Generator:
    text = "/".join([purpose, *map(str, counters)])
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

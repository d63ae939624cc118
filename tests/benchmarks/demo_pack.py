"""Times the demo's four trials trained as one pack against the same four one after the other.

usage: PYTHONPATH=. python tests/benchmarks/demo_pack.py [--steps 12] [--rounds 5] [--threads 2]

The recipes are those of `lorafarm demo`, shortened; base, pictures and training loop are its own.
In a round the pack trains all four, then each trains alone; a round's figure is the median step of
the pack, and the sum of the four median steps alone. The ratio is the median of the rounds' ratios:
what else the machine does hits both.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path

import torch
import yaml
from step_loop import demo_dataset

from training import STARTER_BASE, Base, LatentCache, Recipe, encode_dataset, load_base
from training.events import Event, StepTaken
from training.loop import Callbacks, train_pack
from training.pack.slot import Trial

SWEEP = Path(__file__).parents[2] / "services/cli/demo/sweep.yaml"
WARM_UP_STEPS = 2


def demo_recipes(steps: int) -> list[Recipe]:
    """Every recipe of the demo's search space, for so many steps at its full learning rate."""
    sweep = yaml.safe_load(SWEEP.read_text())
    search = sweep["search"]
    recipes = []
    for values in itertools.product(*search.values()):
        network = dict(zip((key.split(".")[1] for key in search), values, strict=True))
        shortened = {"steps": steps, "checkpoint_every": steps, "schedule": {"type": "constant"}}
        recipes.append(Recipe.model_validate({**sweep["recipe"], **shortened, "network": network}))
    return recipes


def median_step_ms(base: Base, cache: LatentCache, recipes: list[Recipe], folder: Path) -> float:
    """The median time of a step of a pack that trains these recipes from first to last step."""
    taken: dict[int, float] = {}

    def note(event: Event) -> None:
        if isinstance(event, StepTaken):
            taken[event.step] = event.step_ms

    def fail(trial: Trial, error: Exception) -> None:
        raise error

    trials = [Trial(folder / f"t{k}", recipe, cache) for k, recipe in enumerate(recipes)]
    train_pack(base, trials, Callbacks(fail, on_event=note))
    return statistics.median(ms for step, ms in taken.items() if step > WARM_UP_STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipes = demo_recipes(WARM_UP_STEPS + options.steps)
    names = ", ".join(f"{recipe.network.method} r{recipe.network.rank}" for recipe in recipes)
    print(f"torch {torch.__version__}, {options.threads} threads; {names}, batch 8 each")
    base = load_base(STARTER_BASE)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        cache = encode_dataset(demo_dataset(), base, None, False, Path(folder) / "latents")
        base.release_encoders()
        for number in range(options.rounds):
            here = Path(folder) / str(number)
            packed = median_step_ms(base, cache, recipes, here / "pack")
            alone = sum(
                median_step_ms(base, cache, [recipe], here / f"solo-{k}")
                for k, recipe in enumerate(recipes)
            )
            rounds.append((packed, alone))
    print("| a step of all four | ms |\n|---|---|")
    print(f"| one after the other | {statistics.median(alone for _, alone in rounds):.0f} |")
    print(f"| as one pack | {statistics.median(packed for packed, _ in rounds):.0f} |")
    ratio = statistics.median(alone / packed for packed, alone in rounds)
    print(f"ratio, median of {len(rounds)} rounds: {ratio:.2f}")


if __name__ == "__main__":
    main()

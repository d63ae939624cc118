"""Times the training loop with cached latents against one that encodes everything at every step.

usage: PYTHONPATH=. python tests/benchmarks/step_loop.py [--base FOLDER] [--resolution PX]
           [--pack 1] [--batch 4] [--rank 16] [--steps 20] [--threads 2] [--device cpu]

The other loop does what diffusers' train_text_to_image_lora.py does in a step, in fp32: decode and
crop the pictures, tokenize and encode the captions, encode the pictures, PEFT's LoRA on the UNet,
backward, clipping, AdamW. Both train the same base from the same weights on the same pictures,
posterior samples, noise and timesteps; the losses of every step must agree. They take turns, a
step each, and the ratio is the median of the pairs' ratios: what else the machine does hits both.
With `--pack K` the cached loop trains K trials at once, and its step counts a Kth for each. The
pictures are the demo's, of one character; the base is of the sd15 family.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

from captioning import DatasetVersion, Sample
from training import STARTER_BASE, Base, LatentCache, Recipe, encode_dataset, load_base
from training.data.batches import draw_batch
from training.data.crop import read_pixels
from training.events import Event, StepTaken
from training.loop import Callbacks, train_pack
from training.pack.slot import Trial

PICTURES = Path(__file__).parents[2] / "services" / "cli" / "demo" / "pictures" / "aya"
WARM_UP_STEPS = 2
# A share of a loss; the loops add up in other orders, and training carries that on.
LOSS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Taken:
    """Seconds of one step of both loops, and how much of the other one's is encoding."""

    cached: float
    encoding_loop: float
    encoding: float


def demo_dataset() -> DatasetVersion:
    """The demo's pictures with captions of a usual length."""
    samples = []
    for number, path in enumerate(sorted(PICTURES.glob("*.png"))):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        caption = f"ayachar, person, smile, red shirt, blue background, number {number}"
        samples.append(Sample(sha256=sha256, path=path, caption=caption, width=0, height=0))
    return DatasetVersion(
        "v0001-00000000", PICTURES, "aya", "ayachar", "person", tuple(samples), (), "0" * 64
    )


class EncodingLoop:
    """diffusers' script, step by step, with the draws of our loop."""

    def __init__(
        self, base: Base, dataset: DatasetVersion, cache: LatentCache, recipe: Recipe
    ) -> None:
        self.base, self.dataset, self.cache, self.recipe = base, dataset, cache, recipe
        self.size_px = recipe.resolution or base.native_size_px
        self.scheduler = DDPMScheduler.from_pretrained(base.folder, subfolder="scheduler")
        torch.manual_seed(recipe.seed)
        rank = recipe.network.rank
        base.denoiser.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=list(base.attention_modules))
        )
        self.parameters = [p for p in base.denoiser.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay
        )

    def step(self, number: int) -> tuple[float, float, float]:
        """Loss, seconds, and seconds of encoding, of step `number` (0-based)."""
        base, device = self.base, self.base.device
        draws = draw_batch(
            self.recipe,
            self.cache,
            number,
            range(self.recipe.batch_size),
            self.recipe.batch_size,
            base.objective,
        )
        images = list(draws.images)
        (squares,) = self.cache.buckets
        deviation = torch.exp(0.5 * squares.logvar[images, 0])
        spread = ((draws.posterior_samples - squares.mean[images, 0]) / deviation).to(device)
        samples = [self.dataset.train[image] for image in images]
        _wait(device)
        started = time.perf_counter()
        pixels = torch.stack([read_pixels(sample.path, self.size_px) for sample in samples])
        mean, logvar = base.encode_pixels(pixels.to(device))
        latents = base.to_latents(mean + torch.exp(0.5 * logvar) * spread)
        text = base.encode_prompts([sample.caption for sample in samples])
        _wait(device)
        encoded = time.perf_counter()
        noise, timesteps = draws.noise.to(device), draws.timesteps.to(device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        loss = F.mse_loss(
            base.predict(noisy, timesteps, text), self._target(latents, noise, timesteps)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = float(loss.detach())
        _wait(device)
        return value, time.perf_counter() - started, encoded - started

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.base.objective.prediction_type == "epsilon":
            return noise
        target: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
        return target


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(base: str, device: str, recipe: Recipe, slots: int) -> list[Taken]:
    """Train with both loops in turns; SystemExit if the losses of a step do not agree.

    `slots` trials in the cached loop, of which the first is the one of the other loop.
    """
    dataset = demo_dataset()
    taken: list[Taken] = []
    differences: list[float] = []
    ours, theirs = load_base(base, device), load_base(base, device)
    with tempfile.TemporaryDirectory() as folder:
        cache = encode_dataset(dataset, ours, recipe.resolution, False, Path(folder) / "latents")
        ours.release_encoders()
        other = EncodingLoop(theirs, dataset, cache, recipe)

        def take_turns(event: Event) -> None:
            if not isinstance(event, StepTaken) or event.trial != "t0":
                return
            # The loop's own clock has stopped: what is done here is not part of its step.
            loss, seconds, encoding = other.step(event.step - 1)
            differences.append(abs(loss - event.loss) / loss)
            taken.append(Taken(event.step_ms / 1000 / slots, seconds, encoding))

        def fail(trial: Trial, error: Exception) -> None:
            raise error

        recipes = [recipe.model_copy(update={"seed": number}) for number in range(slots)]
        trials = [Trial(Path(folder) / f"t{k}", own, cache) for k, own in enumerate(recipes)]
        train_pack(ours, trials, Callbacks(fail, on_event=take_turns))
    if max(differences) > LOSS_TOLERANCE:
        raise SystemExit(f"the losses differ by up to {max(differences):.2g} of themselves")
    print(f"losses of {len(differences)} steps agree within {max(differences):.1g} of themselves")
    return taken[WARM_UP_STEPS:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default=str(STARTER_BASE))
    parser.add_argument("--resolution", type=int, default=None)
    parser.add_argument("--pack", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = WARM_UP_STEPS + options.steps
    recipe = Recipe.model_validate(
        {
            "network": {"rank": options.rank},
            "steps": steps,
            "checkpoint_every": steps,
            "batch_size": options.batch,
            "resolution": options.resolution,
            "precision": "fp32",
            "min_snr_gamma": None,
            "caption_dropout": 0.0,
        }
    )
    print(
        f"torch {torch.__version__}, {options.device}, {options.threads} threads, "
        f"{Path(options.base).name}, batch {options.batch}, rank {options.rank}, fp32, "
        f"pack of {options.pack}"
    )
    taken = compare(options.base, options.device, recipe, options.pack)
    cached = statistics.median(one.cached for one in taken)
    other = statistics.median(one.encoding_loop for one in taken)
    encoding = statistics.median(one.encoding for one in taken)
    ratio = statistics.median(one.encoding_loop / one.cached for one in taken)
    print(f"step with cached latents {cached * 1000:.0f} ms per trial")
    print(f"step that encodes {other * 1000:.0f} ms, of which encoding {encoding * 1000:.0f} ms")
    print(f"ratio, median of {len(taken)} pairs: {ratio:.2f}")


if __name__ == "__main__":
    main()

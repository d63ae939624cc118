"""Prior preservation, masks and tag orders in real steps, against plain PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image as Picture

from captioning import DatasetVersion
from training.checkpoints import list_checkpoints, load_checkpoint
from training.data.batches import draw_batch
from training.data.captions import CaptionPlan
from training.data.latents import LatentCache, encode_dataset
from training.families import Base, load_base
from training.loop import Callbacks, train, train_pack
from training.pack.slot import Trial
from training.recipe import Recipe

EPS = 1e-4  # keeps rounding in the smallest gradients small


def recipe(**changes: Any) -> Recipe:
    options = {
        "network": {"rank": 4},
        "optimizer": {"lr": 1e-2, "eps": EPS},
        "steps": 3,
        "checkpoint_every": 3,
        "batch_size": 2,
        "min_snr_gamma": None,
    }
    return Recipe.model_validate({**options, **changes})


def adapter(trial_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(trial_dir)[-1].path).adapter


@pytest.fixture
def half_clear(tiny_dataset: DatasetVersion, tmp_path: Path) -> DatasetVersion:
    """The pictures of `tiny_dataset`, the first one with a transparent left half."""
    first, *others = tiny_dataset.train
    with Picture.open(first.path) as picture:
        layer = picture.convert("RGBA")
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[:, :32] = 0
    layer.putalpha(Picture.fromarray(alpha))
    layer.save(tmp_path / "clear.png")
    clear = replace(first, path=tmp_path / "clear.png", sha256="0" * 64)
    return replace(tiny_dataset, train=(clear, *others))


@pytest.fixture
def cache(tiny_base: Base, half_clear: DatasetVersion, tmp_path: Path) -> LatentCache:
    plan = CaptionPlan(orders=3, kept=2, without_trigger=True)
    return encode_dataset(half_clear, tiny_base, None, True, tmp_path / "latents", captions=plan)


def test_what_is_encoded(tiny_base: Base, half_clear: DatasetVersion, cache: LatentCache) -> None:
    assert cache.orders == 3 and cache.text["text"].shape == (6, 3, 77, 32)
    caption = half_clear.train[1].caption
    assert caption.startswith("zkw, person, ")
    anybody = tiny_base.encode_prompts([caption.removeprefix("zkw, ")])["text"][0]
    torch.testing.assert_close(cache.prior_conditions(1)["text"], anybody)
    (squares,) = cache.buckets
    mask = squares.mask[0, 0, 0]  # (h, w)
    assert not mask[:, :4].any() and (mask[:, 4:] == 1).all()
    assert torch.equal(squares.mask[0, 1, 0], mask.flip(-1))  # mirrored with the picture
    assert (squares.mask[1:] == 1).all()


@pytest.mark.parametrize("prior", [0.0, 0.5])
@pytest.mark.parametrize("masked", [None, 0.25])
def test_equal_to_a_plain_peft_loop(
    tiny_base: Base,
    tiny_base_path: Path,
    cache: LatentCache,
    prior: float,
    masked: float | None,
    tmp_path: Path,
) -> None:
    options = recipe(prior_weight=prior, masked_loss=masked, tag_orders=3, seed=3)
    train(tiny_base, cache, options, tmp_path / "trial")
    found = adapter(tmp_path / "trial")

    unet = load_base(tiny_base_path).denoiser
    torch.manual_seed(options.seed)
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=EPS, weight_decay=0.01)
    orders = set()
    for step in range(options.steps):
        batch = draw_batch(options, cache, step, range(2), 2, tiny_base.objective)
        for image, text in zip(batch.images, batch.conditions["text"], strict=True):
            orders.update(v for v in range(3) if torch.equal(text, cache.text["text"][image, v]))
        latents = tiny_base.to_latents(batch.posterior_samples)
        noisy = tiny_base.objective.noisy(latents, batch.noise, batch.timesteps)
        output = unet(noisy, batch.timesteps, batch.conditions["text"]).sample
        errors = (output - batch.noise) ** 2
        if masked is not None:
            errors = errors * (masked + (1 - masked) * batch.masks)
        loss = errors.mean()
        if prior:
            anybody = batch.prior_conditions["text"]
            unet.disable_adapters()
            with torch.no_grad():
                teacher = unet(noisy, batch.timesteps, anybody).sample
            unet.enable_adapters()
            pupil = unet(noisy, batch.timesteps, anybody).sample
            loss = loss + prior * torch.nn.functional.mse_loss(pupil, teacher)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert len(orders) > 1
    for key, tensor in unet.named_parameters():
        if "lora_" in key:
            wanted = tensor.detach()
            own = found[f"unet.{key.replace('.default', '')}"]
            assert (own - wanted).abs().max() <= 1e-5 * wanted.abs().max(), key


def test_masks_and_priors_in_company_equal_their_solo_runs(
    tiny_base: Base, cache: LatentCache, tmp_path: Path
) -> None:
    recipes = [
        recipe(prior_weight=1.0),
        recipe(prior_weight=0.1, masked_loss=0.0, seed=1),
        recipe(prior_weight=0.1, tag_orders=3, seed=2, network={"rank": 2, "method": "dora"}),
    ]
    trials = [Trial(tmp_path / f"pack/{k}", one, cache) for k, one in enumerate(recipes)]

    def fail(trial: Trial, error: Exception) -> None:
        raise AssertionError(trial.id) from error

    train_pack(tiny_base, trials, Callbacks(fail))
    for trial in trials:
        train(tiny_base, cache, trial.recipe, tmp_path / "solo" / trial.id)
        alone, together = adapter(tmp_path / "solo" / trial.id), adapter(trial.trial_dir)
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key], tensor, rtol=1e-4, atol=1e-6, msg=key)


def test_a_mask_without_transparency_is_refused(
    tiny_base_path: Path, frozen_dataset: DatasetVersion, tmp_path: Path
) -> None:
    from training.group import Group
    from training.run.job import SweepJob, TrialSpec
    from training.run.worker import Worker

    job = SweepJob(
        base=str(tiny_base_path),
        dataset_path=str(frozen_dataset.path),
        latents_dir=str(tmp_path / "latents"),
        trials=(TrialSpec("t0", recipe(masked_loss=0.1), tmp_path / "t0"),),
        scoring=None,
        score_dir=str(tmp_path / "scores"),
    )
    group, device = Group(0, 1), torch.device("cpu")
    worker = Worker(job, group, device, lambda _: None, lambda: False, None, max_deaths=1)
    problem = worker.run()
    assert problem is not None and problem.where == "recipe: masked_loss"
    assert "transparent" in problem.found

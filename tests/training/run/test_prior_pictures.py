"""Prior preservation with class pictures, against diffusers' own loss in a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from torch.nn import functional as F

from captioning import ClassPictures, DatasetVersion, Store, UserError
from training.checkpoints import list_checkpoints, load_checkpoint
from training.data.batches import CLASS_STREAM, draw_batch
from training.data.class_pictures import class_samples
from training.data.latents import LatentCache, encode_samples
from training.events import StepTaken
from training.families import Base, load_base
from training.group import Group
from training.loop import Callbacks, train, train_pack
from training.pack.pack import shared_by_a_pack
from training.pack.plan import MAX_SAMPLES, plan_packs
from training.pack.slot import Trial
from training.recipe import Recipe, trial_id
from training.run.job import SweepJob, TrialSpec
from training.run.probe import ProbeRequest, measure_pack
from training.run.worker import Worker

MakeCache = Callable[..., LatentCache]
SET = "c0123456789ab"
EPS = 1e-4  # keeps rounding in the smallest gradients small
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def recipe(**changes: Any) -> Recipe:
    options = {
        "network": {"rank": 4},
        "optimizer": {"lr": 1e-2, "eps": EPS},
        "steps": 4,
        "checkpoint_every": 2,
        "batch_size": 2,
        "prior_weight": 0.7,
        "class_pictures": SET,
    }
    return Recipe.model_validate({**options, **changes})


def adapter(trial_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(trial_dir)[-1].path).adapter


def assert_close(found: Path, wanted: Path, tolerance: float = TOLERANCE) -> None:
    own = adapter(found)
    for name, tensor in adapter(wanted).items():
        error = float((own[name] - tensor).abs().max())
        assert error <= tolerance * float(tensor.abs().max()), name


def fail(trial: Trial, error: Exception) -> None:
    raise AssertionError(trial.id) from error


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_equal_to_a_plain_loop_with_the_loss_of_diffusers(
    tiny_base: Base,
    tiny_base_path: Path,
    make_cache: MakeCache,
    gamma: float | None,
    tmp_path: Path,
) -> None:
    cache, of_class = make_cache(tiny_base), make_cache(tiny_base, count=5, seed=1)
    options = recipe(min_snr_gamma=gamma, seed=3)
    train(tiny_base, cache, options, tmp_path / "trial", class_cache=of_class)
    found = adapter(tmp_path / "trial")

    unet = load_base(tiny_base_path).denoiser
    scheduler = DDIMScheduler.from_pretrained(tiny_base_path / "scheduler")
    torch.manual_seed(options.seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=EPS, weight_decay=0.01)
    for step in range(options.steps):
        counters = step, range(2), 2, tiny_base.objective
        own = draw_batch(options, cache, *counters)
        theirs = draw_batch(options, of_class, *counters, CLASS_STREAM)
        assert not torch.equal(own.noise, theirs.noise)
        # As in train_dreambooth_lora_sdxl.py: one batch of both, chunked again.
        samples = torch.cat([own.posterior_samples, theirs.posterior_samples])
        noise = torch.cat([own.noise, theirs.noise])
        timesteps = torch.cat([own.timesteps, theirs.timesteps])
        text = torch.cat([own.conditions["text"], theirs.conditions["text"]])
        noisy = scheduler.add_noise(tiny_base.to_latents(samples), noise, timesteps)
        prediction, prior_prediction = torch.chunk(unet(noisy, timesteps, text).sample, 2)
        target, prior_target = torch.chunk(noise, 2)
        prior_loss = F.mse_loss(prior_prediction, prior_target)
        if gamma is None:
            loss = F.mse_loss(prediction, target)
        else:
            snr = compute_snr(scheduler, own.timesteps)
            weights = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
            loss = F.mse_loss(prediction, target, reduction="none").mean([1, 2, 3])
            loss = (loss * weights).mean()
        loss = loss + options.prior_weight * prior_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    for key, tensor in unet.named_parameters():
        if "lora_" in key:
            wanted = tensor.detach()
            mine = found[f"unet.{key.replace('.default', '')}"]
            assert (mine - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), key


def test_in_company_interrupted_and_accumulated_as_alone(
    tiny_base: Base, make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache(tiny_base, views=2)
    of_class = [make_cache(tiny_base, count=n, views=2, seed=n) for n in (3, 5)]
    recipes = [
        recipe(prior_weight=1.0, masked_loss=0.5, huber_c=0.1),
        recipe(seed=2, network={"rank": 2, "method": "dora"}),
    ]

    def trials(folder: str) -> list[Trial]:
        return [
            Trial(tmp_path / folder / f"t{k}", one, cache, theirs)
            for k, (one, theirs) in enumerate(zip(recipes, of_class, strict=True))
        ]

    train_pack(tiny_base, trials("packed"), Callbacks(fail))
    steps: list[int] = []

    def count(event: dict[str, Any]) -> None:
        steps.extend([event.step] if isinstance(event, StepTaken) else [])

    # Left after a step that no checkpoint has: it is done again.
    broken = trials("broken")
    train_pack(tiny_base, broken, Callbacks(fail, on_event=count, stop=lambda: len(steps) >= 4))
    assert [c.step for c in list_checkpoints(broken[0].trial_dir)] == [2]
    train_pack(tiny_base, broken, Callbacks(fail))
    for trial in trials("packed"):
        again = adapter(tmp_path / "broken" / trial.id)
        assert all(torch.equal(again[k], v) for k, v in adapter(trial.trial_dir).items())
        solo, split = tmp_path / "solo" / trial.id, tmp_path / "split" / trial.id
        train(tiny_base, cache, trial.recipe, solo, class_cache=trial.class_cache)
        assert_close(trial.trial_dir, solo)
    halves = trial.recipe.model_copy(update={"batch_size": 1, "accumulation": 2})
    train(tiny_base, cache, halves, split, class_cache=trial.class_cache)
    assert_close(split, solo)
    # The weight counts, and so do the pictures.
    other = recipes[1].model_copy(update={"prior_weight": 0.6})
    train(tiny_base, cache, other, tmp_path / "weight", class_cache=of_class[1])
    train(tiny_base, cache, recipes[1], tmp_path / "pictures", class_cache=of_class[0])
    for folder in ("weight", "pictures"):
        with pytest.raises(AssertionError):
            assert_close(tmp_path / folder, solo, 1e-3)


def test_they_have_draws_of_their_own_whatever_the_split(
    tiny_base: Base, make_cache: MakeCache
) -> None:
    cache, options = make_cache(tiny_base, count=5), recipe(seed=7)
    whole = draw_batch(options, cache, 3, range(8), 8, tiny_base.objective, CLASS_STREAM)
    parts = [
        draw_batch(options, cache, 3, [place], 8, tiny_base.objective, CLASS_STREAM)
        for place in range(8)
    ]
    assert whole.images == tuple(part.images[0] for part in parts)
    assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))
    images = [
        draw_batch(options, cache, 0, [n], 5, tiny_base.objective, CLASS_STREAM).images[0]
        for n in range(5)
    ]
    assert sorted(images) == list(range(5))


def test_packs_count_both_and_keep_apart_who_has_none() -> None:
    both, teacher, none = recipe(), recipe(class_pictures=None), Recipe()
    assert len({shared_by_a_pack(one) for one in (both, teacher, none)}) == 3
    assert shared_by_a_pack(both) == shared_by_a_pack(recipe(class_pictures="c" + 12 * "0"))
    wide = [recipe(seed=seed, batch_size=MAX_SAMPLES // 4) for seed in range(4)]
    assert [len(pack) for pack in plan_packs(wide)] == [2, 2]


def test_a_recipe_names_them_whole_or_not_at_all(tiny_dataset: DatasetVersion) -> None:
    with pytest.raises(ValueError, match="prior_weight, which is 0"):
        Recipe(class_pictures="people")
    with pytest.raises(ValueError, match="class_prompt is the caption of class_pictures"):
        Recipe(prior_weight=1.0, class_prompt="person")
    with pytest.raises(ValueError, match="class_pictures are cropped to squares"):
        recipe(aspect_buckets=True)
    others = [recipe(), recipe(class_pictures="c" + 12 * "0"), recipe(class_prompt="person")]
    ids = {trial_id(tiny_dataset, "b", one) for one in others}
    assert len(ids) == 3
    assert "class_" not in Recipe(prior_weight=1.0).canonical()


def test_the_probe_holds_the_doubled_batch(
    tiny_base: Base, tiny_base_path: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    seen: list[int] = []
    cache = make_cache(tiny_base)
    hook = tiny_base.denoiser.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    train(tiny_base, cache, recipe(steps=1), tmp_path / "one", class_cache=cache)
    hook.remove()
    assert seen == [2 * 2]
    with pytest.raises(ValueError, match="must be named and encoded"):
        Trial(tmp_path, recipe(), cache)
    request = ProbeRequest(str(tiny_base_path), (recipe(),), use_gpu=False, threads=1)
    measured = measure_pack(request)
    assert measured is not None and measured.step_s > 0


def test_captions_and_what_is_refused(
    class_set: tuple[Store, ClassPictures], frozen_dataset: DatasetVersion
) -> None:
    _, pictures = class_set
    assert [s.caption for s in class_samples(pictures, "a person", frozen_dataset)] == [
        "a person"
    ] * 3
    with pytest.raises(UserError, match="2 of 3 pictures have no caption"):
        class_samples(pictures, None, frozen_dataset)
    with pytest.raises(UserError, match=r"class_prompt: .*trigger zkw in it"):
        class_samples(pictures, "zkw, person", frozen_dataset)
    held_out = replace(pictures, samples=(*pictures.samples, frozen_dataset.holdout[0]))
    with pytest.raises(UserError, match="1 of 4 pictures are pictures of zara too"):
        class_samples(held_out, "person", frozen_dataset)


def test_a_worker_encodes_and_trains_with_the_set(
    class_set: tuple[Store, ClassPictures],
    tiny_base: Base,
    tiny_base_path: Path,
    frozen_dataset: DatasetVersion,
    tmp_path: Path,
) -> None:
    store, pictures = class_set
    asked = recipe(class_pictures=pictures.name, class_prompt="person", steps=2)
    job = SweepJob(
        base=str(tiny_base_path),
        dataset_path=str(frozen_dataset.path),
        latents_dir=str(tmp_path / "latents"),
        trials=(TrialSpec("t0", asked, tmp_path / "t0"),),
        scoring=None,
        score_dir=str(tmp_path / "scores"),
        store=str(store.root),
    )
    device = torch.device("cpu")
    worker = Worker(job, Group(0, 1), device, lambda _: None, lambda: False, None, max_deaths=1)
    assert worker.run() is None
    assert len(list((tmp_path / "latents").iterdir())) == 2
    own = encode_samples(frozen_dataset.train, tiny_base, None, False, tmp_path / "latents", None)
    samples = class_samples(pictures, "person", frozen_dataset)
    theirs = encode_samples(samples, tiny_base, None, False, tmp_path / "latents")
    other = class_samples(pictures, "people", frozen_dataset)
    assert encode_samples(other, tiny_base, None, False, tmp_path / "others").key != theirs.key
    train(tiny_base, own, asked, tmp_path / "alone", class_cache=theirs)
    assert_close(tmp_path / "t0", tmp_path / "alone", 0)

    missing = replace(job, trials=(replace(job.trials[0], recipe=recipe(steps=2)),))
    worker = Worker(missing, Group(0, 1), device, lambda _: None, lambda: False, None, 1)
    problem = worker.run()
    assert problem is not None and "no such set" in problem.found and problem.fix is not None

"""Adapters on text encoders: a plain loop's numbers, alone and in packs, and a bare base after."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_effects import random_adapter
from diffusers import DDPMScheduler
from encoder_rig import EPS, base, cache, encoded, family, loaded, small
from pack_runs import assert_same_training, fail, run_with_interruptions, trials
from peft import LoraConfig
from pydantic import ValidationError
from trained_trials import last_adapter, rows

from captioning import DatasetVersion
from training.checkpoints import Contents
from training.cuts import cut_network
from training.data.batches import CLASS_STREAM, Batch, draw_batch
from training.data.captions import CaptionPlan
from training.data.latents import LatentCache, encode_dataset, encode_samples
from training.families import Base
from training.loop import Callbacks, train, train_pack
from training.losses import pack_losses
from training.pack.adapters import (
    adapted_layers,
    cut_at,
    detach,
    load_adapter,
    target_layers,
)
from training.pack.nested import cut_adapter
from training.pack.pack import TrialState, form_pack
from training.pack.slot import Trial
from training.recipe import Recipe


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def encoded_by_diffusers(base: Base, encoders: dict[str, Any], captions: Any) -> dict[str, Any]:
    """As `encode_prompt` of the families' text-to-image scripts, with gradients."""
    states, pooled = [], None
    asked = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    for encoder, tokenizer in zip(encoders.values(), base.tokenizers.values(), strict=True):
        ids = tokenizer(list(captions), **asked).input_ids
        if base.family == "sd15":
            return {"text": encoder(ids)[0]}
        output = encoder(ids, output_hidden_states=True, return_dict=False)
        states.append(output[-1][-2])
        pooled = output[0]
    return {"text": torch.cat(states, dim=-1), "pooled": pooled}


def asked_of(base: Base, denoiser: Any, noisy: Any, batch: Any, told: dict[str, Any]) -> Any:
    added = {}
    if base.family == "sdxl":
        times = batch.conditions["time_ids"]
        added["added_cond_kwargs"] = {"text_embeds": told["pooled"], "time_ids": times}
    return denoiser(noisy, batch.timesteps, told["text"], **added).sample


__all__ = ["base", "cache", "encoded", "family", "loaded"]  # fixtures
LORA = {"targets": "attention", "alpha": 2.0}
DORA = {"targets": "attention+ff", "method": "dora", "dora_axis": "output"}


@pytest.mark.parametrize(
    ("family", "network"),
    [("sd15", LORA), ("sdxl", LORA), ("sdxl", DORA)],
    ids=["sd15-lora", "sdxl-lora", "sdxl-dora"],
    indirect=["family"],
)
def test_training_equals_a_plain_diffusers_and_peft_loop(
    base: Base, cache: LatentCache, network: dict[str, Any], tmp_path: Path
) -> None:
    recipe = small(network, clip_norm=0.01, seed=5)
    denoiser, encoders = copy.deepcopy(base.denoiser), copy.deepcopy(base.text_encoders)
    train(base, cache, recipe, tmp_path / "trial")
    found = last_adapter(tmp_path / "trial")
    norms = [row["grad_norm"] for row in rows(tmp_path / "trial")]

    torch.manual_seed(recipe.seed)
    dora, own = recipe.network.method == "dora", recipe.network.of_encoders()
    denoiser.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=recipe.network.effective_alpha,
            target_modules=list(target_layers(base, recipe.network)),
            use_dora=dora,
        )
    )
    for name, encoder in encoders.items():
        modules = ["q_proj", "k_proj", "v_proj", "out_proj"] + (["fc1", "fc2"] if dora else [])
        encoder.requires_grad_(False)
        encoder.add_adapter(
            LoraConfig(
                r=3,
                lora_alpha=own.effective_alpha,
                target_modules=modules,
                use_dora=dora,
                # SDXL reads the last hidden state but one of its first encoder.
                exclude_modules=r".*layers\.1\..*"
                if base.family == "sdxl" and name == "text_encoder"
                else None,
            )
        )
    of_denoiser = [p for p in denoiser.parameters() if p.requires_grad]
    of_encoders = [p for e in encoders.values() for p in e.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": of_denoiser, "lr": 1e-2}, {"params": of_encoders, "lr": 3e-3}],
        eps=EPS,
        weight_decay=0.01,
    )
    scheduler = DDPMScheduler.from_pretrained(base.folder, subfolder="scheduler")
    wanted_norms = []
    for step in range(recipe.steps):
        batch = draw_batch(recipe, cache, step, range(2), 2, base.objective)
        latents = base.to_latents(batch.posterior_samples)
        noisy = scheduler.add_noise(latents, batch.noise, batch.timesteps)
        told = encoded_by_diffusers(base, encoders, batch.captions)
        loss = (asked_of(base, denoiser, noisy, batch, told) - batch.noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*of_denoiser, *of_encoders], recipe.clip_norm or 0)
        wanted_norms.append(float(norm))
        optimizer.step()
    assert min(wanted_norms) > 0.01
    assert norms == pytest.approx(wanted_norms, rel=1e-5)
    wanted = {
        f"{component}.{key.replace('.default', '')}": tensor.detach()
        for component, network_ in {"unet": denoiser, **encoders}.items()
        for key, tensor in network_.named_parameters()
        if "lora_" in key
    }
    wanted = {
        key.removesuffix(".weight") if "magnitude" in key else key: tensor
        for key, tensor in wanted.items()
    }
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        assert (found[key] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), key
    learnt = [t.abs().max() for n, t in wanted.items() if "text_encoder" in n and "lora_B" in n]
    assert min(learnt) > 1e-4


def mixed() -> list[Recipe]:
    """Both methods and axes, several ranks, rates, optimisers and lengths."""
    return [
        small(seed=1, steps=2),
        small({"method": "dora", "dora_axis": "input", "text_encoder": {}}, seed=2, ema_decay=0.9),
        small(
            {"method": "dora", "dora_axis": "output", "text_encoder": {"rank": 8, "alpha": 2.0}},
            seed=3,
            optimizer={"lr": 1e-3, "eps": EPS, "lora_plus_ratio": 4.0},
            clip_norm=0.01,
            steps=2,
        ),
        small(
            {"rank": 2, "init": "pissa"},
            seed=4,
            optimizer={"type": "lion", "lr": 1e-3},
            steps=3,
        ),
    ]


def test_in_a_pack_every_trial_learns_what_it_learns_alone(
    base: Base, cache: LatentCache, tmp_path: Path
) -> None:
    """Slots are taken again, averages kept, and a base left bare."""
    recipes = mixed() if base.family == "sd15" else mixed()[:3]
    before = {n: copy.deepcopy(e.state_dict()) for n, e in base.text_encoders.items()}
    packed = trials(tmp_path / "packed", recipes, [cache] * len(recipes))
    train_pack(base, packed, Callbacks(fail), trials_per_pack=2)
    for trial in packed:
        train(base, cache, trial.recipe, tmp_path / "solo" / trial.id)
        assert_same_training(trial.trial_dir, tmp_path / "solo" / trial.id)
    assert [row["pack"] for row in rows(packed[1].trial_dir)] == [2, 2, 2, 2]
    assert not base.text_is_adapted
    for name, encoder in base.text_encoders.items():
        after = encoder.state_dict()
        assert after.keys() == before[name].keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in before[name].items())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_slots_at_buckets_of_other_shapes_hear_their_own_captions(
    base: Base, make_cache: Callable[..., LatentCache], tmp_path: Path
) -> None:
    """The first and the third compute together, the second between them by itself."""
    shapes = [{(4, 12): 2}, {(10, 6): 2}, {(4, 12): 3}]
    caches = [make_cache(base, seed=k, buckets=buckets) for k, buckets in enumerate(shapes)]
    recipes = [small(each, seed=k, steps=2) for k, each in enumerate(({}, {"method": "dora"}, {}))]
    packed = trials(tmp_path / "packed", recipes, caches)
    train_pack(base, packed, Callbacks(fail))
    for trial in packed:
        train(base, trial.cache, trial.recipe, tmp_path / "solo" / trial.id)
        assert_same_training(trial.trial_dir, tmp_path / "solo" / trial.id)


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_an_interrupted_run_equals_an_unbroken_one_bit_for_bit(
    base: Base, cache: LatentCache, tmp_path: Path
) -> None:
    recipe = small({"method": "dora"}, steps=6, ema_decay=0.9)
    train(base, cache, recipe, tmp_path / "whole")
    run_with_interruptions(base, cache, recipe, tmp_path / "broken", [3, 2])
    for step in (2, 4, 6):
        for name in ("adapter.safetensors", "state.safetensors", "manifest.json"):
            files = [tmp_path / f / f"step-{step:06d}" / name for f in ("whole", "broken")]
            assert files[0].read_bytes() == files[1].read_bytes(), files[0]


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_words_that_are_not_finite_fail_their_own_trial_only(
    base: Base, cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [small(seed=seed) for seed in range(2)]
    encode, calls = base.encode_prompts, []

    def poisoned(prompts: list[str]) -> dict[str, torch.Tensor]:
        calls.append(prompts)
        factors = torch.ones(len(prompts), 1, 1)
        factors[2:] = math.inf if len(calls) == 3 else 1.0
        return {name: tensor * factors for name, tensor in encode(prompts).items()}

    monkeypatch.setattr(base, "encode_prompts", poisoned)
    failed: list[str] = []
    packed = trials(tmp_path / "packed", recipes, [cache] * 2)
    done = train_pack(base, packed, Callbacks(lambda trial, error: failed.append(str(error))))
    assert done == {"t0": 4} and "trial t1, step 3" in failed[0]
    train(base, cache, recipes[0], tmp_path / "solo")
    assert_same_training(packed[0].trial_dir, tmp_path / "solo")


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_fp16_scales_and_unscales_the_encoders_too(
    base: Base, cache: LatentCache, tmp_path: Path
) -> None:
    exact, half = tmp_path / "fp32", tmp_path / "fp16"
    for folder in (exact, half):
        train(base, cache, small(precision=folder.name, steps=2), folder)
    wanted, found = last_adapter(exact), last_adapter(half)
    for name in (n for n in wanted if "text_encoder" in n and "lora_B" in n):
        # Two steps of Adam: their direction is that of the gradients, which have 11 bits here.
        cosine = torch.cosine_similarity(wanted[name].flatten(), found[name].flatten(), dim=0)
        assert cosine > 0.99, name


def asked_for(base: Base, batch: Batch, captions: tuple[str, ...]) -> torch.Tensor:
    """What the base answers to the batch's noisy latents and these captions."""
    noisy = base.objective.noisy(
        base.to_latents(batch.posterior_samples), batch.noise, batch.timesteps
    )
    told = {**batch.conditions, **base.encode_prompts(list(captions))}
    return base.predict(noisy, batch.timesteps, told)


def mean_square(errors: torch.Tensor) -> torch.Tensor:
    return errors.square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
@pytest.mark.parametrize("with_pictures", [False, True])
def test_priors_hear_the_trained_encoders_and_their_teacher_the_bare_ones(
    base: Base, tiny_dataset: DatasetVersion, with_pictures: bool, tmp_path: Path
) -> None:
    recipe = small(
        prior_weight=0.5, tag_orders=3, class_pictures="others" if with_pictures else None
    )
    cache = encode_dataset(tiny_dataset, base, 64, False, tmp_path, captions=CaptionPlan.of(recipe))
    others = encode_samples(tiny_dataset.holdout, base, 64, False, tmp_path)
    batch = draw_batch(recipe, cache, 0, range(3), 3, base.objective)
    of_class = draw_batch(recipe, others, 0, range(3), 3, base.objective, CLASS_STREAM)
    teacher = asked_for(base, batch, batch.prior_captions) if batch.prior_captions else None
    assert with_pictures == (teacher is None)
    assert all("zkw" not in caption for caption in batch.prior_captions)
    state = random_adapter(base, recipe)
    load_adapter(base, state, recipe.network)
    if teacher is None:
        kept = asked_for(base, of_class, of_class.captions) - of_class.noise
    else:
        kept = asked_for(base, batch, batch.prior_captions) - teacher
    own = asked_for(base, batch, batch.captions) - batch.noise
    detach(base)
    trial = Trial(tmp_path, recipe, cache, others if with_pictures else None)
    pack = form_pack(base, [TrialState(trial, Contents(0, recipe, state, {}))], scaled=False)
    class_batches = [of_class] if with_pictures else []
    found = pack_losses(base, pack.bank, pack.slots, [batch], class_batches)[0]
    detach(base)
    torch.testing.assert_close(found, mean_square(own) + 0.5 * mean_square(kept))


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_a_cut_of_nested_ranks_cuts_the_encoders_too(base: Base) -> None:
    network = {"nested_ranks": [2, 4], "text_encoder": {"alpha": 3.0}}
    recipe = small(network)
    state, prompts = random_adapter(base, recipe), ["zkw, person"]
    load_adapter(base, state, recipe.network)
    whole = base.encode_prompts(prompts)["text"]
    with cut_at(base, 2):
        wanted = base.encode_prompts(prompts)["text"]
    load_adapter(base, cut_adapter(state, 2), cut_network(recipe.network, 2))
    found = base.encode_prompts(prompts)["text"]
    detach(base)
    torch.testing.assert_close(found, wanted)
    assert (whole - wanted).abs().max() > 0.01
    with pytest.raises(ValidationError, match=r"text_encoder.rank gives"):
        small({**network, "text_encoder": {"rank": 3}})


def test_layers_that_no_output_rests_on_are_left_out(base: Base) -> None:
    layers = adapted_layers(base, small().network)
    encoders = sorted(name for name in layers if name.startswith("text_encoder"))
    attentions = 4 * (2 if base.family == "sd15" else 1 + 2)
    assert len(encoders) == attentions
    assert not any(".layers.1." in n for n in encoders if base.family == "sdxl" and "_2" not in n)
    wide = adapted_layers(base, small({"targets": "attention+ff"}).network)
    assert len([name for name in wide if ".fc" in name]) == attentions // 2
    only = adapted_layers(base, small({"targets": "regex:mid_block.*to_q$"}).network)
    assert [name for name in only if name.startswith("text_encoder")] == [
        name for name in layers if name in encoders
    ]

"""Schedules, loss weights and targets against their formulas, written here a second time."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from training.recipe import Recipe
from training.schedule import (
    add_noise,
    learning_rate,
    min_snr_weights,
    sample_losses,
    training_target,
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    steps = draw(st.integers(1, 3000))
    return Recipe.model_validate(
        {
            "steps": steps,
            "optimizer": {"lr": draw(st.floats(1e-7, 1e-1))},
            "schedule": {
                "type": draw(st.sampled_from(["constant", "wsd", "cosine"])),
                "warmup_steps": draw(st.integers(0, steps)),
                "decay_share": draw(st.floats(0.01, 1.0)),
            },
        }
    )


@given(recipe=recipes(), data=st.data())
def test_learning_rate_follows_the_formula(recipe: Recipe, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, recipe.steps - 1))
    peak, warmup, total = recipe.optimizer.lr, recipe.schedule.warmup_steps, recipe.steps
    if step < warmup:
        factor = (step + 1) / warmup
    elif recipe.schedule.type == "constant":
        factor = 1.0
    elif recipe.schedule.type == "cosine":
        factor = math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) ** 2
    else:
        cooldown = max(1, round(total * recipe.schedule.decay_share))
        start = max(warmup, total - cooldown)
        factor = 1.0 if step < start else 1 - ((step - start) / (total - start)) ** 0.5
    assert learning_rate(recipe, step) == pytest.approx(peak * factor, rel=1e-9, abs=1e-15)


@given(recipe=recipes())
def test_learning_rate_rises_then_never_rises_again_and_stays_positive(recipe: Recipe) -> None:
    rates = [learning_rate(recipe, step) for step in range(recipe.steps)]
    top = recipe.schedule.warmup_steps
    assert all(0 < rate <= recipe.optimizer.lr * (1 + 1e-12) for rate in rates)
    assert all(a <= b for a, b in itertools.pairwise(rates[:top]))
    assert all(a >= b for a, b in itertools.pairwise(rates[top:]))


@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
def test_min_snr_is_the_papers_formula(gamma: float) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    timesteps = torch.arange(1000)
    snr = compute_snr(scheduler, timesteps)  # diffusers' own
    alphas = scheduler.alphas_cumprod
    clipped = torch.minimum(snr, torch.full_like(snr, gamma))
    torch.testing.assert_close(
        min_snr_weights(alphas, timesteps, "epsilon", gamma), clipped / snr, rtol=2e-4, atol=1e-7
    )
    torch.testing.assert_close(
        min_snr_weights(alphas, timesteps, "v_prediction", gamma),
        clipped / (snr + 1),
        rtol=2e-4,
        atol=1e-7,
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_is_finite_at_zero_terminal_snr(prediction_type: str) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    assert float(scheduler.alphas_cumprod[-1]) == 0.0
    weights = min_snr_weights(
        scheduler.alphas_cumprod, torch.arange(1000), prediction_type, gamma=5.0
    )
    assert torch.isfinite(weights).all()
    assert float(weights[-1]) == (1.0 if prediction_type == "epsilon" else 0.0)


def test_no_gamma_means_equal_weights() -> None:
    alphas = DDPMScheduler().alphas_cumprod
    assert torch.equal(
        min_snr_weights(alphas, torch.tensor([0, 999]), "epsilon", None), torch.ones(2)
    )


def test_every_sample_has_the_loss_of_its_own_recipe() -> None:
    generator = torch.Generator().manual_seed(2)
    prediction, target = torch.randn(2, 3, 4, 8, 8, generator=generator)
    errors = (prediction - target).double().numpy()
    wanted = [
        (errors[0] ** 2).mean(),
        (2 * 0.1 * (np.hypot(errors[1], 0.1) - 0.1)).mean(),
        (2 * 100 * (np.hypot(errors[2], 100) - 100)).mean(),
    ]
    found = sample_losses(prediction, target, [None, 0.1, 100.0])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3)
    # A c far over all errors is the square again.
    np.testing.assert_allclose(wanted[2], (errors[2] ** 2).mean(), rtol=1e-3)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_targets_are_those_of_the_ddpm_scheduler(zero_snr: bool) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, 8, 8, generator=generator)
    noise = torch.randn(4, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 10, 500, 999])
    alphas = scheduler.alphas_cumprod
    torch.testing.assert_close(
        add_noise(latents, noise, alphas, timesteps),
        scheduler.add_noise(latents, noise, timesteps),
    )
    torch.testing.assert_close(
        training_target(latents, noise, alphas, timesteps, "v_prediction"),
        scheduler.get_velocity(latents, noise, timesteps),
    )
    assert torch.equal(training_target(latents, noise, alphas, timesteps, "epsilon"), noise)


def test_v_and_noise_targets_say_the_same() -> None:
    """√ᾱ·v + √(1-ᾱ)·x_t = ε: the v target leads back to the noise."""
    alphas = DDPMScheduler().alphas_cumprod
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([3, 400, 990])
    noisy = add_noise(latents, noise, alphas, timesteps)
    v = training_target(latents, noise, alphas, timesteps, "v_prediction")
    rate = np.sqrt(alphas[timesteps].numpy()).reshape(-1, 1, 1, 1)
    recovered = rate * v.numpy() + np.sqrt(1 - rate**2) * noisy.numpy()
    np.testing.assert_allclose(recovered, noise.numpy(), atol=1e-5)

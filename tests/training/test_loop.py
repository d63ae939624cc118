"""The loop against plain references: PEFT by hand, the large batch, an unbroken run."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from captioning import UserError
from training.checkpoints import list_checkpoints, load_checkpoint
from training.data.batches import draw_batch
from training.data.latents import LatentCache
from training.events import Event, PackMeasured, StepTaken
from training.families import Base, load_base
from training.loop import TrainingDiverged, train
from training.objective import Diffusion
from training.pack.adapters import is_attached
from training.precision import resolve_precision
from training.recipe import Recipe

MakeCache = Callable[..., LatentCache]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def small(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": {"rank": 4},
        "optimizer": {"lr": 1e-3},
        "steps": 4,
        "checkpoint_every": 100,
        "seed": 11,
    }
    return Recipe.model_validate({**data, **changes})


def rows(trial_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trial_dir / "metrics.jsonl").read_text().splitlines()]


def losses(trial_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(trial_dir)]


def last_adapter(trial_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(list_checkpoints(trial_dir)[-1].path).adapter


def adamw(recipe: Recipe) -> Callable[[list[Any], list[Any]], torch.optim.Optimizer]:
    def make(others: list[Any], ups: list[Any]) -> torch.optim.Optimizer:
        lr, eps = recipe.optimizer.lr, recipe.optimizer.eps  # type: ignore[union-attr]
        faster = {"params": ups, "lr": lr * recipe.optimizer.lora_plus_ratio}  # type: ignore[union-attr]
        groups = [{"params": others}, faster]
        return torch.optim.AdamW(groups, lr=lr, eps=eps, weight_decay=0.01)

    return make


def peft_by_hand(
    folder: Path,
    cache: LatentCache,
    recipe: Recipe,
    make: Callable[[list[Any], list[Any]], torch.optim.Optimizer] | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training with nothing but diffusers, PEFT and torch; only the draws are shared.

    `make(others, ups)`: another optimiser than AdamW.
    """
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    objective = Diffusion(scheduler.config.prediction_type, scheduler.alphas_cumprod)
    vae_scale = 0.18215
    unet.requires_grad_(False)
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.network.rank,
        lora_alpha=recipe.network.rank if recipe.network.alpha is None else recipe.network.alpha,
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        use_dora=recipe.network.method == "dora",
        use_rslora=recipe.network.rank_stabilised,
    )
    unet.add_adapter(config)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    ups = [p for name, p in unet.named_parameters() if "lora_B" in name]
    others = [p for p in parameters if not any(p is up for up in ups)]
    optimizer = (make or adamw(recipe))(others, ups)
    history = []
    for step in range(recipe.steps):
        draws = draw_batch(recipe, cache, step, range(4), 4, objective)
        latents = draws.posterior_samples * vae_scale
        noisy = scheduler.add_noise(latents, draws.noise, draws.timesteps)
        snr = compute_snr(scheduler, draws.timesteps)
        clipped = snr.clamp(max=5.0)
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, draws.noise, draws.timesteps)
            weights = clipped / (snr + 1)
        else:
            target = draws.noise
            weights = clipped / snr
        output = unet(noisy, draws.timesteps, draws.conditions["text"], return_dict=False)[0]
        errors = torch.nn.functional.mse_loss(output, target, reduction="none")
        if (c := recipe.huber_c) is not None:  # as in sd-scripts' conditional_loss
            errors = 2 * c * (torch.sqrt((output - target) ** 2 + c**2) - c)
        loss = (errors.mean(dim=[1, 2, 3]) * weights).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    state = get_peft_model_state_dict(unet)
    return history, {f"unet.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_equal_to_a_plain_peft_loop(
    tiny_base_path: Path,
    tiny_v_base_path: Path,
    make_cache: MakeCache,
    tmp_path: Path,
    method: str,
    prediction: str,
) -> None:
    folder = tiny_base_path if prediction == "epsilon" else tiny_v_base_path
    base = load_base(folder)
    cache = make_cache(base)
    network = {"rank": 4, "alpha": 2.0, "method": method, "dora_axis": "output"}
    recipe = small(network=network, steps=5)
    train(base, cache, recipe, tmp_path)
    expected_losses, expected = peft_by_hand(folder, cache, recipe)
    assert losses(tmp_path) == pytest.approx(expected_losses, rel=1e-5)
    found = last_adapter(tmp_path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    moved = max(float(t.abs().max()) for name, t in found.items() if "lora_B" in name)
    assert moved > 1e-3  # it did train


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    "extra",
    [
        {"network": {"rank_stabilised": True}},
        {"optimizer": {"lora_plus_ratio": 8.0}},
        {"huber_c": 0.1},
        {"noise_offset": 0.3},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_every_extra_equals_a_plain_peft_loop(
    tiny_base: Base,
    tiny_base_path: Path,
    tiny_cache: LatentCache,
    tmp_path: Path,
    method: str,
    extra: dict[str, Any],
) -> None:
    plain = {
        "network": {"rank": 4, "alpha": 2.0, "method": method, "dora_axis": "output"},
        # With the usual 1e-8 a gradient of pure rounding noise would move a weight by a whole lr.
        "optimizer": {"lr": 1e-3, "eps": 1e-5},
    }
    parts = {part: plain[part] | extra.get(part, {}) for part in plain}
    recipe = small(steps=5, **(extra | parts))
    train(tiny_base, tiny_cache, recipe, tmp_path / "with")
    expected_losses, expected = peft_by_hand(tiny_base_path, tiny_cache, recipe)
    assert losses(tmp_path / "with") == pytest.approx(expected_losses, rel=1e-5)
    for name, tensor in last_adapter(tmp_path / "with").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-6)
    train(tiny_base, tiny_cache, small(steps=5, **plain), tmp_path / "without")
    assert losses(tmp_path / "with")[-1] != losses(tmp_path / "without")[-1]


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_accumulation_equals_the_large_batch(
    tiny_v_base: Base, tiny_v_cache: LatentCache, tmp_path: Path, batch: int, accumulation: int
) -> None:
    # With the usual 1e-8 a gradient of pure rounding noise would move a weight by a whole lr.
    options = {"lr": 1e-3, "eps": 1e-4}
    whole = small(batch_size=4, optimizer=options)
    train(tiny_v_base, tiny_v_cache, whole, tmp_path / "large")
    split = small(batch_size=batch, accumulation=accumulation, optimizer=options)
    train(tiny_v_base, tiny_v_cache, split, tmp_path / "split")
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "large"), rel=1e-5)
    large, small_batches = last_adapter(tmp_path / "large"), last_adapter(tmp_path / "split")
    for name in large:
        largest = float(large[name].abs().max())
        torch.testing.assert_close(small_batches[name], large[name], rtol=0, atol=1e-5 * largest)


def test_the_seed_decides_everything(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    for name, seed in [("one", 1), ("again", 1), ("other", 2)]:
        torch.manual_seed(hash(name) % 1000)  # whatever the global generator holds
        train(tiny_base, tiny_cache, small(seed=seed), tmp_path / name)
    assert losses(tmp_path / "one") == losses(tmp_path / "again") != losses(tmp_path / "other")
    one, again = last_adapter(tmp_path / "one"), last_adapter(tmp_path / "again")
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_training_lowers_the_loss(tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path) -> None:
    recipe = small(steps=60, optimizer={"lr": 1e-2}, network={"rank": 8})
    train(tiny_base, tiny_cache, recipe, tmp_path)
    history = losses(tmp_path)
    assert sum(history[-15:]) < 0.97 * sum(history[:15])


def test_events_metrics_and_checkpoints_tell_the_same(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    trial_dir = tmp_path / "t0123456789ab"
    recipe = small(steps=5, checkpoint_every=2, schedule={"type": "cosine", "warmup_steps": 2})
    events: list[Event] = []
    seen: list[tuple[int, str, bool]] = []

    def on_checkpoint(step: int, path: Path) -> None:
        seen.append((step, path.name, is_attached(tiny_base)))
        assert (path / "manifest.json").exists()

    last = train(
        tiny_base,
        tiny_cache,
        recipe,
        trial_dir,
        on_event=events.append,
        on_checkpoint=on_checkpoint,
    )
    assert last == 5
    assert seen == [(2, "step-000002", True), (4, "step-000004", True), (5, "step-000005", True)]
    assert [c.step for c in list_checkpoints(trial_dir)] == [2, 4, 5]
    assert not is_attached(tiny_base)
    (pack,) = [event for event in events if isinstance(event, PackMeasured)]
    assert pack.trials == ("t0123456789ab",)
    events.remove(pack)
    assert [event.step for event in events] == [1, 2, 3, 4, 5]
    common = {"trial": "t0123456789ab", "steps": 5}
    assert events == [StepTaken(**common, **row) for row in rows(trial_dir)]
    assert events[0].lr == pytest.approx(5e-4)
    assert all(math.isfinite(event.loss) and event.step_ms > 0 for event in events)
    # A finished trial is not trained again.
    again = train(tiny_base, tiny_cache, recipe, trial_dir, on_event=events.append)
    assert (again, len(events)) == (5, 5)


def run_with_interruptions(
    base: Base, cache: LatentCache, recipe: Recipe, trial_dir: Path, stops: list[int]
) -> None:
    for stop_after in stops:
        done: list[Event] = []
        train(
            base,
            cache,
            recipe,
            trial_dir,
            on_event=lambda event, done=done: isinstance(event, StepTaken) and done.append(event),
            stop=lambda done=done, stop_after=stop_after: len(done) + 1 >= stop_after,
        )
    train(base, cache, recipe, trial_dir)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_interrupted_run_equals_an_unbroken_one_bit_for_bit(
    tiny_v_base: Base, tiny_v_cache: LatentCache, tmp_path: Path, method: str
) -> None:
    recipe = small(
        network={"rank": 4, "method": method},
        steps=9,
        checkpoint_every=3,
        accumulation=2,
        batch_size=2,
        schedule={"type": "wsd", "warmup_steps": 2, "decay_share": 0.5},
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(tiny_v_base, tiny_v_cache, recipe, whole)
    # Stopped at step 2 (nothing saved yet), then 1 after the checkpoint of step 3, then at 6.
    run_with_interruptions(tiny_v_base, tiny_v_cache, recipe, broken, [2, 4, 3])
    assert losses(broken) == losses(whole)
    assert [row["step"] for row in rows(broken)] == list(range(1, 10))
    for step in (3, 6, 9):
        for name in ("adapter.safetensors", "state.safetensors", "recipe.yaml", "manifest.json"):
            file = f"step-{step:06d}/{name}"
            assert (broken / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_torn_last_checkpoint_is_skipped_on_resume(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    recipe = small(steps=6, checkpoint_every=2)
    train(tiny_base, tiny_cache, recipe, tmp_path / "whole")
    train(tiny_base, tiny_cache, recipe, tmp_path / "torn")
    for step in (4, 6):
        state = tmp_path / f"torn/step-{step:06d}/state.safetensors"
        state.write_bytes(state.read_bytes()[:-7])
    metrics = tmp_path / "torn/metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 7, "lo')  # a row cut off by a crash
    events: list[Event] = []
    train(tiny_base, tiny_cache, recipe, tmp_path / "torn", on_event=events.append)
    assert [event.step for event in events if isinstance(event, StepTaken)] == [3, 4, 5, 6]
    assert losses(tmp_path / "torn") == losses(tmp_path / "whole")
    whole = (tmp_path / "whole/step-000006/adapter.safetensors").read_bytes()
    assert (tmp_path / "torn/step-000006/adapter.safetensors").read_bytes() == whole


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_stays_near_fp32(
    tiny_v_base: Base, tiny_v_cache: LatentCache, tmp_path: Path, precision: str
) -> None:
    for name in ("fp32", precision):
        train(tiny_v_base, tiny_v_cache, small(steps=6, precision=name), tmp_path / name)
    assert losses(tmp_path / precision) == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)
    assert losses(tmp_path / precision) != losses(tmp_path / "fp32")  # it was another precision
    adapter = last_adapter(tmp_path / precision)
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values())
    norms = [row["grad_norm"] for row in rows(tmp_path / precision)]
    # Unscaled before they are clipped and reported.
    expected = [row["grad_norm"] for row in rows(tmp_path / "fp32")]
    assert norms == pytest.approx(expected, rel=0.1)


def poison(base: Base, step: int, monkeypatch: pytest.MonkeyPatch, gradient: bool) -> None:
    """Make the gradient, or the loss, of the given call of the UNet infinite."""
    calls = 0
    predict = base.predict

    def poisoned(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        output = predict(*arguments)
        if calls != step:
            return output
        if not gradient:
            return output * math.inf
        output.register_hook(lambda grad: grad * math.inf)
        return output

    monkeypatch.setattr(base, "predict", poisoned)


def test_an_overflowed_fp16_step_is_skipped_and_the_scale_halves(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(tiny_base, 2, monkeypatch, gradient=True)
    recipe = small(steps=3, checkpoint_every=1, precision="fp16")
    train(tiny_base, tiny_cache, recipe, tmp_path)
    contents = [load_checkpoint(c.path) for c in list_checkpoints(tmp_path)]
    assert [float(c.state["scaler/scale"]) for c in contents] == [65536.0, 32768.0, 32768.0]
    first, second, third = (c.adapter for c in contents)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)
    moments = [n for n in contents[0].state if n.startswith("optimizer/")]
    assert all(torch.equal(contents[0].state[n], contents[1].state[n]) for n in moments)
    assert [row["grad_norm"] is None for row in rows(tmp_path)] == [False, True, False]


def test_fp16_resumes_with_its_scale(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(steps=4, checkpoint_every=2, precision="fp16")
    with monkeypatch.context() as patch:
        poison(tiny_base, 2, patch, gradient=True)
        train(tiny_base, tiny_cache, recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        poison(tiny_base, 2, patch, gradient=True)
        run_with_interruptions(tiny_base, tiny_cache, recipe, tmp_path / "broken", [3])
    files = [tmp_path / f"{name}/step-000004/state.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert float(load_file(files[0])["scaler/scale"]) == 32768.0


@pytest.mark.parametrize("gradient", [True, False])
def test_what_is_not_finite_stops_the_trial_with_step_and_remedy(
    tiny_base: Base,
    tiny_cache: LatentCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gradient: bool,
) -> None:
    poison(tiny_base, 3, monkeypatch, gradient)
    recipe = small(steps=6, checkpoint_every=2)
    with pytest.raises(TrainingDiverged) as caught:
        train(tiny_base, tiny_cache, recipe, tmp_path / "t1")
    message = str(caught.value)
    assert "trial t1, step 3" in message
    assert "optimizer.lr" in message
    assert isinstance(caught.value, UserError)
    assert [c.step for c in list_checkpoints(tmp_path / "t1")] == [2]
    assert not is_attached(tiny_base)


def test_fp16_gradients_that_never_fit_stop_the_trial(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = tiny_base.predict

    def always(*arguments: torch.Tensor) -> torch.Tensor:
        output = predict(*arguments)
        output.register_hook(lambda grad: grad * math.inf)
        return output

    monkeypatch.setattr(tiny_base, "predict", always)
    with pytest.raises(TrainingDiverged, match="overflow at every loss scale"):
        train(tiny_base, tiny_cache, small(steps=100, batch_size=1, precision="fp16"), tmp_path)
    assert len(rows(tmp_path)) == 16  # 65536 = 2^16


def test_precision_auto_is_that_of_the_device() -> None:
    assert resolve_precision(Recipe(), torch.device("cpu"), "fp16") == "fp32"
    assert resolve_precision(Recipe(), torch.device("cuda"), "fp16") == "fp16"
    assert resolve_precision(Recipe(), torch.device("cuda"), "bf16") == "bf16"
    assert resolve_precision(Recipe(precision="bf16"), torch.device("cuda"), "fp16") == "bf16"


def test_caption_dropout_of_one_never_shows_a_caption(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[torch.Tensor] = []
    predict = tiny_base.predict

    def listen(
        latents: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        texts.append(conditions["text"])
        return predict(latents, timesteps, conditions)

    monkeypatch.setattr(tiny_base, "predict", listen)
    train(tiny_base, tiny_cache, small(steps=2, caption_dropout=1.0), tmp_path)
    assert all(torch.equal(t, tiny_cache.empty_text["text"]) for text in texts for t in text)

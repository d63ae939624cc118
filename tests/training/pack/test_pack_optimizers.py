"""Every optimiser in a pack: as its library steps over PEFT's parameters, alone and in company."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import bitsandbytes
import lion_pytorch
import prodigyopt
import pytest
import schedulefree
import torch
from test_loop import last_adapter, losses, peft_by_hand, poison, run_with_interruptions
from test_pack import assert_same_training, fail, trials
from transformers.optimization import Adafactor

from captioning import UserError
from training.checkpoints import Contents, list_checkpoints, load_checkpoint
from training.data.latents import LatentCache
from training.export.header import header_facts
from training.families import Base, load_base
from training.loop import Callbacks, train, train_pack
from training.pack.adapters import detach, initial_adapter
from training.pack.pack import TrialState, form_pack
from training.pack.slot import Trial
from training.recipe import Recipe

MakeCache = Callable[..., LatentCache]
TOLERANCE = 1e-5
# From this rank on parts of the tiny base have 4096 numbers, and then moments of 8 bits.
LARGE_RANK = 128

# Steps large enough to be seen, and no divisions by the rounding noise of a zero gradient.
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "eps": 1e-4},
    "adamw8bit": {"lr": 1e-3, "eps": 1e-4},
    "adafactor": {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1},
    "lion": {"lr": 3e-4, "weight_decay": 0.1},
    "prodigy": {"eps": 1e-4, "d0": 1e-4},
    "schedulefree": {"lr": 1e-3, "eps": 1e-4},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def recipe_with(type: str, **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": {"rank": 4, "alpha": 2.0},
        "optimizer": {"type": type, **OPTIONS[type]},
        "steps": 6,
        "checkpoint_every": 3,
        "seed": 11,
    }
    return Recipe.model_validate({**data, **changes})


def by_library(type: str, others: list[Any], ups: list[Any]) -> torch.optim.Optimizer:
    """What a script would write; the numbers are those of OPTIONS and of the recipe's defaults."""
    both = [*others, *ups]
    if type == "adamw8bit":
        return bitsandbytes.optim.AdamW8bit(both, lr=1e-3, eps=1e-4, weight_decay=0.01)
    if type == "adafactor":
        return Adafactor(
            both,
            lr=1e-3,
            eps=(1e-8, 1e-3),
            weight_decay=0.1,
            relative_step=False,
            scale_parameter=False,
            warmup_init=False,
        )
    if type == "lion":
        return lion_pytorch.Lion(both, lr=3e-4, betas=(0.9, 0.99), weight_decay=0.1)
    if type == "prodigy":
        return prodigyopt.Prodigy(
            both,
            lr=1.0,
            eps=1e-4,
            d0=1e-4,
            weight_decay=0.01,
            use_bias_correction=True,
            safeguard_warmup=True,
        )
    assert type == "schedulefree"
    # Its own warm-up, where the recipe has one in its schedule.
    made = schedulefree.AdamWScheduleFree(
        both, lr=1e-3, eps=1e-4, weight_decay=0.01, warmup_steps=3
    )
    made.train()
    return made


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("type", [type for type in OPTIONS if type != "adamw"])
def test_equal_to_a_plain_loop_of_peft_and_the_library(
    tiny_base_path: Path, make_cache: MakeCache, tmp_path: Path, type: str, method: str
) -> None:
    base = load_base(tiny_base_path)
    cache = make_cache(base)
    network = {"rank": 6, "alpha": 2.0, "method": method, "dora_axis": "output"}
    warmup = 3 if type == "schedulefree" else 0
    recipe = recipe_with(type, network=network, schedule={"warmup_steps": warmup})
    train(base, cache, recipe, tmp_path)
    wanted_losses, wanted = peft_by_hand(
        tiny_base_path, cache, recipe, lambda others, ups: by_library(type, others, ups)
    )
    assert losses(tmp_path) == pytest.approx(wanted_losses, rel=TOLERANCE)
    found = last_adapter(tmp_path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        error = float((found[name] - tensor).abs().max())
        assert error <= TOLERANCE * float(tensor.abs().max()), name
    moved = max(float(t.abs().max()) for name, t in found.items() if "lora_B" in name)
    assert moved > 1e-4


def test_moments_of_8_bits_equal_those_of_a_plain_loop(
    tiny_base_path: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    base = load_base(tiny_base_path)
    cache = make_cache(base)
    recipe = recipe_with("adamw8bit", network={"rank": LARGE_RANK})
    train(base, cache, recipe, tmp_path)
    wanted_losses, wanted = peft_by_hand(
        tiny_base_path, cache, recipe, lambda others, ups: by_library("adamw8bit", others, ups)
    )
    assert losses(tmp_path) == pytest.approx(wanted_losses, rel=TOLERANCE)
    # Float noise that moves a moment to the next of its 256 values moves that weight by a small
    # part of a step; there are few of those.
    for name, tensor in last_adapter(tmp_path).items():
        errors = (tensor - wanted[name]).abs() / recipe.optimizer.lr
        assert float(errors.quantile(0.999)) <= 1e-3, name
        assert float(errors.max()) <= 0.05, name


def test_every_optimiser_of_a_mixed_pack_equals_its_solo_run(
    tiny_v_base: Base, tiny_v_cache: LatentCache, tmp_path: Path
) -> None:
    recipes = [
        recipe_with(
            type,
            seed=number,
            network={"rank": 2 + number, "method": "dora" if number % 2 else "lora"},
        )
        for number, type in enumerate(OPTIONS)
    ]
    packed = trials(tmp_path / "packed", recipes, [tiny_v_cache] * len(recipes))
    train_pack(tiny_v_base, packed, Callbacks(fail))
    for trial in packed:
        solo = tmp_path / "solo" / trial.id
        train(tiny_v_base, tiny_v_cache, trial.recipe, solo)
        assert_same_training(trial.trial_dir, solo)


@pytest.mark.parametrize("type", OPTIONS)
def test_an_interrupted_run_equals_an_unbroken_one_bit_for_bit(
    tiny_v_base: Base, tiny_v_cache: LatentCache, tmp_path: Path, type: str
) -> None:
    network = {"rank": LARGE_RANK if type == "adamw8bit" else 4, "method": "dora"}
    recipe = recipe_with(type, network=network, schedule={"warmup_steps": 2}, batch_size=2)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(tiny_v_base, tiny_v_cache, recipe, whole)
    run_with_interruptions(tiny_v_base, tiny_v_cache, recipe, broken, [2, 4])
    assert losses(broken) == losses(whole)
    for step in (3, 6):
        for name in ("adapter.safetensors", "state.safetensors", "recipe.yaml", "manifest.json"):
            file = f"step-{step:06d}/{name}"
            assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
    if type == "adamw8bit":
        state = load_checkpoint(list_checkpoints(whole)[-1].path).state
        kinds = {str(t.dtype) for name, t in state.items() if name.endswith("/state1")}
        assert kinds == {"torch.uint8", "torch.float32"}


def test_an_interrupted_mixed_pack_equals_an_unbroken_one_bit_for_bit(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    recipes = [recipe_with(type, network={"rank": 2 + n}) for n, type in enumerate(OPTIONS)]
    recipes[0] = recipes[0].model_copy(update={"steps": 3})  # one leaves, the others sit anew
    whole = trials(tmp_path / "whole", recipes, [tiny_cache] * len(recipes))
    broken = trials(tmp_path / "broken", recipes, [tiny_cache] * len(recipes))
    train_pack(tiny_base, whole, Callbacks(fail))
    asked: list[int] = []
    train_pack(tiny_base, broken, Callbacks(fail, stop=lambda: asked.append(1) or len(asked) >= 5))
    train_pack(tiny_base, broken, Callbacks(fail))
    for one, other in zip(broken, whole, strict=True):
        assert losses(one.trial_dir) == losses(other.trial_dir)
        last = list_checkpoints(other.trial_dir)[-1].path.name
        for name in ("adapter.safetensors", "state.safetensors"):
            found, wanted = ((t.trial_dir / last / name).read_bytes() for t in (one, other))
            assert found == wanted


@pytest.mark.parametrize("type", OPTIONS)
def test_an_overflowed_fp16_step_changes_neither_weights_nor_state(
    tiny_base: Base,
    tiny_cache: LatentCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    type: str,
) -> None:
    poison(tiny_base, 2, monkeypatch, gradient=True)
    # A rank below that of the pack: the parts are not contiguous in the row.
    recipes = [
        recipe_with(type, precision="fp16", checkpoint_every=1, steps=3),
        recipe_with("adamw", precision="fp16", network={"rank": 6}, steps=3),
    ]
    packed = trials(tmp_path, recipes, [tiny_cache] * 2)
    train_pack(tiny_base, packed, Callbacks(fail))
    first, second, third = (
        load_checkpoint(checkpoint.path) for checkpoint in list_checkpoints(packed[0].trial_dir)
    )
    scales = [float(c.state["scaler/scale"]) for c in (first, second, third)]
    assert scales == [65536.0, 32768.0, 32768.0]
    for kind in ("adapter", "state"):
        before, after = getattr(first, kind), getattr(second, kind)
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert same == before.keys() - {"scaler/scale", "scaler/growth_tracker"}
    assert any(not torch.equal(second.adapter[name], third.adapter[name]) for name in third.adapter)


@pytest.mark.parametrize("type", OPTIONS)
def test_half_precision_stays_near_fp32(
    tiny_v_base: Base, tiny_v_cache: LatentCache, tmp_path: Path, type: str
) -> None:
    for precision in ("fp32", "fp16"):
        recipe = recipe_with(type, precision=precision)
        train(tiny_v_base, tiny_v_cache, recipe, tmp_path / precision)
    assert losses(tmp_path / "fp16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)


@pytest.mark.parametrize("type", ["adamw8bit", "adafactor", "lion"])
def test_lora_plus_equals_a_group_of_its_own_for_b(
    tiny_base_path: Path, make_cache: MakeCache, tmp_path: Path, type: str
) -> None:
    base = load_base(tiny_base_path)
    cache = make_cache(base)
    options = {"type": type, **OPTIONS[type], "lora_plus_ratio": 4.0}
    recipe = recipe_with(type, optimizer=options)

    def make(others: list[Any], ups: list[Any]) -> torch.optim.Optimizer:
        optimizer = by_library(type, others, [])
        group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        optimizer.add_param_group({**group, "params": ups, "lr": group["lr"] * 4})
        return optimizer

    train(base, cache, recipe, tmp_path)
    wanted_losses, wanted = peft_by_hand(tiny_base_path, cache, recipe, make)
    assert losses(tmp_path) == pytest.approx(wanted_losses, rel=TOLERANCE)
    for name, tensor in last_adapter(tmp_path).items():
        error = float((tensor - wanted[name]).abs().max())
        assert error <= 2 * TOLERANCE * float(wanted[name].abs().max()), name


def test_a_schedule_free_checkpoint_shows_the_average_and_keeps_the_rest(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    """x = z + (y - z)·(1/β - ...) by the paper: y = (1-β)·z + β·x, so x = (y - (1-β)·z)/β."""
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([500]), {"text": torch.ones(1, 77, 32)}
    seen: list[torch.Tensor] = []

    def look(trial: Trial, step: int, path: Path) -> None:
        with torch.no_grad():
            seen.append(tiny_base.predict(*inputs))

    recipe = recipe_with("schedulefree", optimizer={"type": "schedulefree", "lr": 1e-2})
    packed = trials(tmp_path, [recipe, recipe_with("adamw")], [tiny_cache] * 2)
    train_pack(tiny_base, packed, Callbacks(fail, on_checkpoint=look))
    contents = load_checkpoint(list_checkpoints(packed[0].trial_dir)[-1].path)
    for name, average in contents.adapter.items():
        y = contents.state[f"trained/{name}"].double()
        module, part = name.removeprefix("unet.").removesuffix(".weight").rsplit(".", 1)
        z = contents.state[f"optimizer/{module}.{part}.default.weight/z"].double()
        wanted = (y - (1 - 0.9) * z) / 0.9
        torch.testing.assert_close(average.double(), wanted, rtol=1e-4, atol=1e-6)
        assert not torch.equal(contents.state[f"trained/{name}"], average)
    bare = TrialState(packed[0], Contents(6, recipe, contents.adapter, {}))
    form_pack(tiny_base, [bare], scaled=False)
    with torch.no_grad():
        torch.testing.assert_close(seen[-2], tiny_base.predict(*inputs), rtol=1e-5, atol=1e-6)
    detach(tiny_base)


@pytest.mark.parametrize("type", OPTIONS)
def test_the_header_names_the_class_that_took_the_steps(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, type: str
) -> None:
    recipe = recipe_with(type)
    contents = Contents(0, recipe, initial_adapter(tiny_base, recipe.network, 0), {})
    pack = form_pack(
        tiny_base, [TrialState(Trial(tmp_path, recipe, tiny_cache), contents)], scaled=False
    )
    named = header_facts(tiny_base, recipe, 6, "lora", "zara", None)["ss_optimizer"]
    module, _, name = named.rpartition(".")
    assert isinstance(pack.slots[0].optimizer, getattr(import_module(module), name))
    assert pack.slots[0].optimizer_state() == {}  # it never stepped


def test_an_adamw_is_saved_as_it_always_was(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path
) -> None:
    train(tiny_base, tiny_cache, recipe_with("adamw"), tmp_path)
    contents = load_checkpoint(list_checkpoints(tmp_path)[-1].path)
    parameters = {
        f"optimizer/{name.removeprefix('unet.').removesuffix('.weight')}.default.weight"
        for name in contents.adapter
    }
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert contents.state.keys() == {f"{name}/{kind}" for name in parameters for kind in kinds}
    assert {float(t) for name, t in contents.state.items() if name.endswith("/step")} == {6.0}


def test_an_optimiser_that_is_not_installed_names_what_to_install(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    recipe = recipe_with("adamw8bit")
    contents = Contents(0, recipe, initial_adapter(tiny_base, recipe.network, 0), {})
    with pytest.raises(UserError, match=r"bitsandbytes.*8bit"):
        form_pack(
            tiny_base, [TrialState(Trial(tmp_path, recipe, tiny_cache), contents)], scaled=False
        )

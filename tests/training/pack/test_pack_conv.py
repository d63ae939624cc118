"""Adapters on convolutions: against PEFT, against built weights, in packs, resumed, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_loop import losses, run_with_interruptions
from test_pack import assert_same_training, fail, trials
from test_pack_bank import ENDINGS, assert_near, backward, inputs, network, peft_parts, shaken
from tiny_families import build
from torch import Tensor, nn
from torch.nn import functional as F

from captioning import UserError
from training.data.latents import LatentCache
from training.families import Base, load_base
from training.fitting import fit_recipe
from training.loop import Callbacks, train, train_pack
from training.pack.adapters import attach, attach_pack, detach, initial_adapter, target_layers
from training.pack.bank import AdapterBank, install
from training.pack.norms import input_norms, output_norms
from training.pack.parts import Layer, Parts
from training.recipe import Network, Recipe

CONV = "attention+ff+conv"
LOCON_MODULES = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
KERNELS = r".*(conv1|conv2|samplers\.0\.conv)"  # of 3 × 3 in a UNet's blocks
ADDED = [
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj_in", "proj_out"),
    *("downsamplers.0.conv", "upsamplers.0.conv"),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sdxl_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdxl", tmp_path_factory.mktemp("sdxl"))


def locon(method: str = "lora", **more: Any) -> Network:
    options = {"alpha": 2.0, "conv_rank": 3, "conv_alpha": 6.0, "targets": CONV}
    return network(method, **{"dora_axis": "output", **options, **more})


def peft_unet(folder: Path, config: Network, state: dict[str, Tensor] | None, seed: int) -> Any:
    """The UNet under PEFT, with an adapter's weights or with PEFT's own initial ones."""
    unet = load_base(folder).denoiser
    torch.manual_seed(seed)
    unet.add_adapter(
        LoraConfig(
            r=config.rank,
            lora_alpha=config.effective_alpha,
            target_modules=[*ENDINGS["attention+ff"], *ADDED],
            rank_pattern={KERNELS: config.conv_rank},
            alpha_pattern={KERNELS: config.conv_alpha},
            use_dora=config.method == "dora",
        )
    )
    for name, parameter in unet.named_parameters():
        if "lora_" in name and state is not None:
            plain = name.replace(".default", "")
            plain = plain if "magnitude" not in plain else plain.removesuffix(".weight")
            parameter.data.copy_(state[f"unet.{plain}"])
    return unet


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_one_slot_equals_peft_in_outputs_and_gradients(
    tiny_base: Base, tiny_base_path: Path, method: str
) -> None:
    config = locon(method)
    state = shaken(tiny_base, config, seed=1, size=0.05)
    unet = peft_unet(tiny_base_path, config, state, 0)
    latents, timesteps, text, target = inputs(tiny_base, 5)
    wanted = unet(latents, timesteps, encoder_hidden_states=text).sample
    (wanted - target).square().mean().backward()

    bank = attach_pack(tiny_base, [(config, state)])
    assert_near(backward(tiny_base, [5]), wanted.detach(), "output")
    bank.collect_gradients()
    found = bank.split(0, bank.grads[0])
    gradients = peft_parts(unet, "grad")
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert found[key].shape == gradient.shape
        assert_near(found[key], gradient, str(key))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_one_slot_equals_peft_from_its_first_weights_to_the_tenth_step(
    tiny_base: Base, tiny_base_path: Path, method: str
) -> None:
    config = locon(method)
    unet = peft_unet(tiny_base_path, config, None, seed=3)
    bank = attach(tiny_base, config, seed=3)
    first, found = peft_parts(unet, "data"), bank.split(0, bank.weights[0])
    assert first.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in first.items())
    # With a smaller eps a gradient of little more than rounding noise would move a weight.
    options = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.01}
    plain = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], **options)
    row = torch.nn.Parameter(bank.weights[0])
    row.grad = bank.grads[0]
    packed = torch.optim.AdamW([row], fused=True, **options)
    for step in range(10):
        latents, timesteps, text, target = inputs(tiny_base, step)
        output = unet(latents, timesteps, encoder_hidden_states=text).sample
        (output - target).square().mean().backward()
        plain.step()
        plain.zero_grad()
        bank.zero_grad()
        backward(tiny_base, [step])
        bank.collect_gradients()
        packed.step()
        bank.changed()
    for key, tensor in peft_parts(unet, "data").items():
        assert_near(bank.split(0, bank.weights[0])[key], tensor, str(key))
        assert key[1] != "lora_B" or tensor.abs().max() > 3e-4  # it did train


class Layers(nn.Module):
    """Some layers by themselves, as a denoiser's."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.requires_grad_(False)


def built_weight(weight: Tensor, parts: dict[str, Tensor], config: Network) -> Tensor:
    """W' of LoRA or of DoRA, in full; the norms without gradient."""
    product = (parts["lora_B"].flatten(1) @ parts["lora_A"].flatten(1)).view(weight.shape)
    full = weight + config.scale * product
    if config.method == "lora":
        return full
    if config.dora_axis == "output":
        norm = torch.stack([row.detach().square().sum().sqrt() for row in full])
        ones = [1] * (full.ndim - 1)
        return full * (parts["lora_magnitude_vector"].flatten() / norm).view(-1, *ones)
    norm = torch.stack([full[:, i].detach().square().sum().sqrt() for i in range(full.shape[1])])
    ones = [1] * (full.ndim - 2)
    return full * (parts["lora_input_magnitude"].flatten() / norm).view(1, -1, *ones)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    each=st.integers(1, 2),
    bias=st.booleans(),
)
def test_a_convolution_is_that_of_built_weights(
    seed: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    size: tuple[int, int],
    each: int,
    bias: bool,
) -> None:
    """Any kernel, stride and padding, four slots: outputs and the gradients of all that has any."""
    padding = (min(padding[0], kernel[0] - 1), min(padding[1], kernel[1] - 1))
    configs = [locon(), locon("dora"), locon("dora", dora_axis="input"), locon(conv_rank=5, rank=1)]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Conv2d(3, 4, kernel, stride, padding, bias=bias)
    parent = Layers({"conv": layer})
    bank = AdapterBank({"conv": layer}, configs)
    for slot in range(4):
        own = bank.split(slot, bank.weights[slot])
        drawn = {key: torch.randn(t.shape, generator=generator) for key, t in own.items()}
        bank.load(slot, drawn)
    parts: list[Parts] = [
        {key: t.clone().requires_grad_() for key, t in bank.split(k, bank.weights[k]).items()}
        for k in range(4)
    ]
    install(parent, {"conv": layer}, bank)
    x = torch.randn(4 * each, 3, *size, generator=generator)
    packed, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    output = parent.get_submodule("conv")(packed)
    has_kernel = kernel != (1, 1)
    wanted = torch.cat(
        [
            F.conv2d(
                rows,
                built_weight(
                    layer.weight,
                    {part: tensor for (_, part), tensor in parts[k].items()},
                    configs[k].of_kernels() if has_kernel else configs[k],
                ),
                layer.bias,
                stride,
                padding,
            )
            for k, rows in enumerate(plain.split(each))
        ]
    )
    assert_near(output.detach(), wanted.detach(), "output", 1e-4)
    grad = torch.randn(wanted.shape, generator=generator)
    bank.zero_grad()
    output.backward(grad)
    wanted.backward(grad)
    assert packed.grad is not None and plain.grad is not None
    assert_near(packed.grad, plain.grad, "input", 1e-4)
    bank.collect_gradients()
    for k, own in enumerate(parts):
        for key, found in bank.split(k, bank.grads[k]).items():
            tensor = own[key]
            assert tensor.grad is not None
            assert_near(found, tensor.grad, f"slot {k} {key}", 1e-4)


def test_the_input_axis_equals_built_weights_in_the_whole_unet(tiny_base: Base) -> None:
    config = locon("dora", dora_axis="input")
    state = shaken(tiny_base, config, seed=1, size=0.05)
    layers = target_layers(tiny_base, config)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    weights = {}
    for name, layer in layers.items():
        start = f"unet.{name}."
        own = {
            key.removeprefix(start).removesuffix(".weight"): tensor
            for key, tensor in leaves.items()
            if key.startswith(start)
        }
        kernels = layer.weight.ndim == 4 and layer.weight.shape[2] > 1
        used = config.of_kernels() if kernels else config
        weights[f"{name}.weight"] = built_weight(layer.weight, own, used)
    latents, timesteps, text, target = inputs(tiny_base, 5)
    wanted = torch.func.functional_call(
        tiny_base.denoiser, weights, (latents, timesteps), {"encoder_hidden_states": text}
    ).sample
    (wanted - target).square().mean().backward()
    bank = attach_pack(tiny_base, [(config, state)])
    assert_near(backward(tiny_base, [5]), wanted.detach(), "output")
    bank.collect_gradients()
    for (module, part), found in bank.split(0, bank.grads[0]).items():
        end = ".weight" if part in ("lora_A", "lora_B") else ""
        gradient = leaves[f"unet.{module}.{part}{end}"].grad
        assert gradient is not None
        assert_near(found, gradient, f"{module} {part}", 3e-5)


def mixed() -> list[Network]:
    """Ranks and alphas of their own on both kinds of layers, both methods, both axes."""
    return [
        locon(rank=2, conv_rank=5, conv_alpha=None),
        locon("dora", conv_rank=None, conv_alpha=None),
        locon("dora", dora_axis="input", rank=8, conv_rank=2, conv_alpha=1.0),
        locon(init="pissa", rank=3, conv_rank=2),
    ]


def test_slots_of_a_mixed_pack_equal_their_solo_runs(tiny_v_base: Base) -> None:
    networks, seeds = mixed(), [11, 12, 13, 14]
    states = [shaken(tiny_v_base, n, seed, 0.05) for n, seed in zip(networks, seeds, strict=True)]
    bank = attach_pack(tiny_v_base, list(zip(networks, states, strict=True)))
    outputs = backward(tiny_v_base, seeds).chunk(len(networks))
    bank.collect_gradients()
    packed = [bank.split(k, bank.grads[k]) for k in range(len(networks))]
    for slot, own in enumerate(packed):
        assert torch.equal(bank.join(slot, own), bank.grads[slot])  # padding is zero
    latents, timesteps, text, _ = inputs(tiny_v_base, 99, count=3)
    with torch.no_grad(), bank.only([2]):
        alone = tiny_v_base.predict(latents, timesteps, {"text": text})
    detach(tiny_v_base)
    for slot, seed in enumerate(seeds):
        solo = attach_pack(tiny_v_base, [(networks[slot], states[slot])])
        assert_near(outputs[slot], backward(tiny_v_base, [seed]), f"slot {slot}")
        solo.collect_gradients()
        for key, gradient in solo.split(0, solo.grads[0]).items():
            assert_near(packed[slot][key], gradient, f"slot {slot} {key}")
        if slot == 2:
            with torch.no_grad():
                assert_near(alone, tiny_v_base.predict(latents, timesteps, {"text": text}), "alone")
        detach(tiny_v_base)


def small(config: Network, **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": config.model_dump(),
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
        "steps": 4,
        "checkpoint_every": 2,
        "batch_size": 2,
    }
    return Recipe.model_validate({**data, **changes})


def test_a_pack_of_four_on_sdxl_trains_as_four_solo_runs(
    sdxl_path: Path, make_cache: Any, tmp_path: Path
) -> None:
    base = load_base(sdxl_path)
    cache = make_cache(base)
    optimizers: list[dict[str, Any]] = [
        {"lr": 1e-3, "eps": 1e-2},
        {"type": "adafactor", "eps": 1e-6},  # looks at every tensor's shape
        {"lr": 1e-3, "eps": 1e-2, "lora_plus_ratio": 4},
        {"lr": 1e-3, "eps": 1e-2},
    ]
    recipes = [
        small(config, optimizer=optimizer, seed=seed)
        for seed, (config, optimizer) in enumerate(zip(mixed(), optimizers, strict=True))
    ]
    packed = trials(tmp_path / "packed", recipes, [cache] * 4)
    train_pack(base, packed, Callbacks(fail))
    for trial in packed:
        train(base, cache, trial.recipe, tmp_path / "solo" / trial.id)
        assert_same_training(trial.trial_dir, tmp_path / "solo" / trial.id)


@pytest.mark.parametrize("axis", ["input", "output"])
def test_an_interrupted_run_equals_an_unbroken_one_bit_for_bit(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, axis: str
) -> None:
    recipe = small(locon("dora", dora_axis=axis))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(tiny_base, tiny_cache, recipe, whole)
    run_with_interruptions(tiny_base, tiny_cache, recipe, broken, [3])
    assert losses(broken) == losses(whole)
    for name in ("adapter.safetensors", "state.safetensors"):
        file = f"step-000004/{name}"
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_half_precision_stays_near_fp32(
    tiny_base: Base, tiny_cache: LatentCache, tmp_path: Path, method: str
) -> None:
    for precision in ("fp32", "fp16"):
        recipe = small(locon(method, dora_axis="input"), precision=precision)
        train(tiny_base, tiny_cache, recipe, tmp_path / precision)
    assert losses(tmp_path / "fp16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_the_preset_names_the_layers_of_locon(
    tiny_base_path: Path, sdxl_path: Path, model: str
) -> None:
    """kohya's `enumerate_conv2d_3x3` and `enumerate_linear` look into modules of these classes."""
    base = load_base(tiny_base_path if model == "sd15" else sdxl_path)
    wanted = {
        f"{outer}.{inner}"
        for outer, block in base.denoiser.named_modules()
        if type(block).__name__ in LOCON_MODULES
        for inner, module in block.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    assert target_layers(base, Network(targets=CONV)).keys() == wanted


def test_a_pattern_finds_convolutions_too(tiny_base: Base) -> None:
    layers = target_layers(tiny_base, Network(targets=r"regex:^conv_(in|out)$"))
    assert list(layers) == ["conv_in", "conv_out"]
    with pytest.raises(UserError, match=r"conv_rank.*none of more than one cell"):
        target_layers(tiny_base, Network(targets="regex:to_q$", conv_rank=2))
    tiny_base.denoiser.conv_in.dilation = (2, 2)
    with pytest.raises(UserError, match="conv_in is a convolution in groups, dilated"):
        target_layers(tiny_base, Network(targets="regex:^conv_in$"))


def test_pissa_starts_from_the_kernels_principal_factors(tiny_base: Base) -> None:
    config = locon(init="pissa")
    state = initial_adapter(tiny_base, config, seed=0)
    latents, timesteps, text, _ = inputs(tiny_base, 0)
    with torch.no_grad():
        bare = tiny_base.predict(latents, timesteps, {"text": text})
        attach_pack(tiny_base, [(config, state)])
        assert_near(tiny_base.predict(latents, timesteps, {"text": text}), bare, "output")
    for name, layer in target_layers(tiny_base, config).items():
        if layer.weight.ndim == 2 or layer.weight.shape[2] == 1:
            continue
        down, up = state[f"unet.{name}.lora_A.weight"], state[f"unet.{name}.lora_B.weight"]
        assert down.shape == (6, *layer.weight.shape[1:])
        assert up.shape == (len(layer.weight), 6, 1, 1)
        product = 6.0 / 3 * up[:, :3, 0, 0].double() @ down[:3].flatten(1).double()
        left, values, right = torch.linalg.svd(layer.weight.flatten(1).double())
        wanted = left[:, :3] * values[:3] @ right[:3]
        assert_near(product, wanted, name, 1e-3)  # values that are near are not certain in fp32


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(*[st.integers(1, 5)] * 6),
    scale=st.floats(0.0, 10.0),
)
def test_factored_norms_are_those_of_the_full_kernel(
    seed: int, sizes: tuple[int, ...], scale: float
) -> None:
    layers, adapters, rank, outputs, channels, cells = sizes
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(layers, outputs, channels, cells, generator=generator)
    down = torch.randn(layers, adapters, rank, channels * cells, generator=generator)
    up = scale * torch.randn(layers, adapters, outputs, rank, generator=generator)
    change = (up.double() @ down.double()).view(layers, adapters, outputs, channels, cells)
    full = weights[:, None].double() + change
    size = float(full.norm()) + 1
    flat = list(weights.flatten(2))
    by_input = input_norms(flat, weights.square().sum((1, 3)), down, up)
    by_output = output_norms(flat, weights.square().sum((2, 3)), down, up)
    for found, wanted in ((by_input, full.norm(dim=(2, 4))), (by_output, full.norm(dim=(3, 4)))):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-3 * size)


@pytest.mark.parametrize("family", ["sd3", "flux", "flux2", "zimage", "qwen_image"])
def test_transformers_have_no_convolutions_to_adapt(family: str) -> None:
    with pytest.raises(UserError, match=r"sweep.yaml: network.targets.*transformer"):
        fit_recipe(small(locon()), family, "sweep.yaml")
    assert fit_recipe(small(locon()), "sdxl", "sweep.yaml").network == locon()


def test_settings_of_convolutions_are_part_of_the_id_where_they_change_something() -> None:
    with pytest.raises(ValueError, match="conv_rank is of convolutions"):
        Network(conv_rank=4)
    usual = Recipe(network=Network(targets=CONV)).canonical()
    assert "conv_rank" not in usual and "conv_alpha" not in usual
    same = Network(targets=CONV, rank=16, conv_rank=16, conv_alpha=16.0)
    assert Recipe(network=same).canonical() == usual
    texts = {
        Recipe(network=Network(targets=CONV, **more)).canonical()  # type: ignore[arg-type]
        for more in ({}, {"conv_rank": 4}, {"conv_alpha": 4.0}, {"conv_rank": 4, "conv_alpha": 1.0})
    }
    assert len(texts) == 4
    # alpha goes for both kinds unless conv_alpha is said; without either it is the kind's rank.
    assert Network(targets=CONV, alpha=8, conv_rank=4).of_kernels().scale == 2
    assert Network(targets=CONV, conv_rank=4).of_kernels().scale == 1

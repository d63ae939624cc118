"""The bank against PEFT and against itself: outputs, gradients, ten steps, slots kept apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_rig import (
    assert_near,
    backward,
    inputs,
    network,
    peft_parts,
    peft_unet,
    shaken,
)
from torch import Tensor

from training.families import Base
from training.pack.adapters import adapter_state, attach, attach_pack, detach
from training.pack.norms import input_norms, output_norms
from training.recipe import Network


@pytest.mark.parametrize("targets", ["attention", "attention+ff"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_one_slot_equals_peft_in_outputs_and_gradients(
    tiny_base: Base, tiny_base_path: Path, method: str, targets: str
) -> None:
    config = network(method, alpha=2.0, targets=targets, dora_axis="output")
    state = shaken(tiny_base, config, seed=1)
    unet = peft_unet(tiny_base_path, config, state)
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
        assert_near(found[key], gradient, str(key))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_one_slot_equals_peft_after_ten_steps(
    tiny_base: Base, tiny_base_path: Path, method: str
) -> None:
    config = network(method, alpha=2.0, dora_axis="output")
    unet = peft_unet(tiny_base_path, config, None, seed=3)
    bank = attach(tiny_base, config, seed=3)
    first, found = peft_parts(unet, "data"), bank.split(0, bank.weights[0])
    assert all(torch.equal(found[key], tensor) for key, tensor in first.items())

    # With Adam's usual 1e-8 a gradient of pure rounding noise would move a weight by a whole lr.
    options = {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.01}
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
        assert key[1] != "lora_B" or tensor.abs().max() > 1e-3  # it did train


def mixed() -> list[Network]:
    """Four ranks, both methods and axes, alphas of their own."""
    return [
        network("lora", 2, alpha=4.0),
        network("dora", 4, dora_axis="output", alpha=1.0),
        network("dora", 8, dora_axis="input"),
        network("lora", 3),
        network("dora", 2, dora_axis="input", alpha=6.0),
    ]


def test_slots_of_a_mixed_pack_equal_their_solo_runs(tiny_v_base: Base) -> None:
    networks, seeds = mixed(), [11, 12, 13, 14, 15]
    states = [shaken(tiny_v_base, n, seed) for n, seed in zip(networks, seeds, strict=True)]
    bank = attach_pack(tiny_v_base, list(zip(networks, states, strict=True)))
    outputs = backward(tiny_v_base, seeds).chunk(len(networks))
    bank.collect_gradients()
    packed = [bank.split(k, bank.grads[k]) for k in range(len(networks))]
    _assert_padding_is_zero(bank.join, packed, bank.grads)
    with torch.no_grad(), bank.only([2]):
        latents, timesteps, text, _ = inputs(tiny_v_base, 99, count=3)
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


def _assert_padding_is_zero(join: Any, parts: list[Any], rows: Tensor) -> None:
    """A row holds its own parts and zeros, to the last bit."""
    for slot, own in enumerate(parts):
        assert torch.equal(join(slot, own), rows[slot])
        assert rows[slot].any()


def test_what_is_not_finite_stays_in_its_slot(tiny_v_base: Base) -> None:
    networks = mixed()
    adapters = [(n, shaken(tiny_v_base, n, seed)) for seed, n in enumerate(networks)]
    bank = attach_pack(tiny_v_base, adapters)
    clean_outputs = backward(tiny_v_base, [1, 2, 3, 4, 5])
    bank.collect_gradients()
    clean = bank.grads.clone()
    bank.weights[1, 0] = torch.nan
    bank.changed()
    bank.zero_grad()
    outputs = backward(tiny_v_base, [1, 2, 3, 4, 5])
    bank.collect_gradients()
    assert outputs.view(5, -1).isnan().any(dim=1).tolist() == [False, True, False, False, False]
    assert bank.grads.isnan().any(dim=1).tolist() == [False, True, False, False, False]
    for slot in (0, 2, 3, 4):
        assert torch.equal(bank.grads[slot], clean[slot])
        assert torch.equal(outputs.chunk(5)[slot], clean_outputs.chunk(5)[slot])


def test_a_row_and_its_parts_are_the_same(tiny_base: Base) -> None:
    networks = mixed()
    adapters = [(n, shaken(tiny_base, n, seed)) for seed, n in enumerate(networks)]
    bank = attach_pack(tiny_base, adapters)
    for slot, (_, state) in enumerate(adapters):
        assert torch.equal(
            bank.join(slot, bank.split(slot, bank.weights[slot])), bank.weights[slot]
        )
        found = adapter_state(bank, slot)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_stale_norms_are_never_used_for_gradients(tiny_base: Base) -> None:
    bank = attach(tiny_base, network("dora"), seed=0)
    backward(tiny_base, [1])
    bank.changed()
    with pytest.raises(RuntimeError, match="changed"):
        bank.collect_gradients()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(*[st.integers(1, 6)] * 5),
    scale=st.floats(0.0, 10.0),
)
def test_factored_norms_are_those_of_the_full_weight(
    seed: int, sizes: tuple[int, ...], scale: float
) -> None:
    layers, adapters, rank, out_features, in_features = sizes
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(layers, out_features, in_features, generator=generator)
    down = torch.randn(layers, adapters, rank, in_features, generator=generator)
    up = scale * torch.randn(layers, adapters, out_features, rank, generator=generator)
    full = weights[:, None].double() + up.double() @ down.double()  # (L, D, out, in)
    size = float(full.norm()) + 1
    for compute, axis, own in ((output_norms, -1, -1), (input_norms, -2, -2)):
        squares = weights.square().sum(own)
        found = compute(list(weights), squares, down, up)
        torch.testing.assert_close(found.double(), full.norm(dim=axis), rtol=1e-4, atol=2e-3 * size)

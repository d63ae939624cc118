"""Adapters: what attach adds, and that detach leaves the base as it was, bit for bit."""

import hashlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

from captioning import UserError
from training.families import Base, load_base
from training.pack.adapters import adapter_state, attach, detach, is_attached, load_adapter
from training.recipe import Network

METHODS = ["lora", "dora"]


def fingerprint(base: Base) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(base.denoiser.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def predict(base: Base) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 77, 32, generator=generator)
    with torch.no_grad():
        return base.predict(latents, torch.tensor([10, 700]), {"text": text})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", ["attention", "attention+ff"])
def test_detach_leaves_the_base_bit_identical(tiny_base: Base, method: str, targets: str) -> None:
    before, modules = (
        fingerprint(tiny_base),
        [name for name, _ in tiny_base.denoiser.named_modules()],
    )
    output = predict(tiny_base)
    network = Network(method=method, rank=4, targets=targets)  # type: ignore[arg-type]
    bank = attach(tiny_base, network, seed=0)
    bank.weights.normal_()
    bank.changed()
    assert not torch.equal(predict(tiny_base), output)
    detach(tiny_base)
    assert not is_attached(tiny_base)
    assert fingerprint(tiny_base) == before
    assert [name for name, _ in tiny_base.denoiser.named_modules()] == modules
    assert torch.equal(predict(tiny_base), output)
    attach(tiny_base, network, seed=0)  # and it can be used again


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axis", ["output", "input"])
def test_a_new_adapter_changes_nothing_yet_and_the_base_is_frozen(
    tiny_base: Base, method: str, axis: str
) -> None:
    output = predict(tiny_base)
    network = Network(method=method, rank=4, dora_axis=axis)  # type: ignore[arg-type]
    bank = attach(tiny_base, network, seed=0)
    # DoRA rescales by magnitude/norm, which is 1 up to rounding.
    torch.testing.assert_close(predict(tiny_base), output, rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in tiny_base.denoiser.parameters())
    assert bank.weights.dtype == torch.float32


def test_the_seed_alone_decides_the_first_weights(tiny_base: Base) -> None:
    def first_weights(seed: int, noise_seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise_seed)
        expected_next = torch.rand(1, generator=torch.Generator().manual_seed(noise_seed))
        state = adapter_state(attach(tiny_base, Network(rank=4), seed))
        assert torch.equal(torch.rand(1), expected_next)  # the global generator was not used
        detach(tiny_base)
        return state

    one, same, other = first_weights(3, 0), first_weights(3, 1), first_weights(4, 0)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_state_has_pefts_names_and_comes_back_equal(
    tiny_base: Base, tiny_base_path: Path, method: str
) -> None:
    network = Network(
        method=method,  # type: ignore[arg-type]
        rank=4,
        targets="attention+ff",
        dora_axis="output",
    )
    bank = attach(tiny_base, network, seed=0)
    bank.weights.normal_(generator=torch.Generator().manual_seed(2))
    bank.changed()
    state, output = adapter_state(bank), predict(tiny_base)

    plain = load_base(tiny_base_path).denoiser
    modules = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    plain.add_adapter(LoraConfig(r=4, target_modules=modules, use_dora=method == "dora"))
    assert set(state) == {f"unet.{name}" for name in get_peft_model_state_dict(plain)}
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in state.values())

    other = load_base(tiny_base_path)
    again = adapter_state(load_adapter(other, state, network))
    assert torch.equal(predict(other), output)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    load_adapter(other, state, network)  # replaces the one that is on


def test_an_adapter_of_another_rank_is_refused(tiny_base: Base) -> None:
    state = adapter_state(attach(tiny_base, Network(rank=4), seed=0))
    with pytest.raises(UserError, match="rank 8"):
        load_adapter(tiny_base, state, Network(rank=8))
    assert not is_attached(tiny_base)
    state.popitem()
    with pytest.raises(UserError, match="1 of"):
        load_adapter(tiny_base, state, Network(rank=4))


def test_two_adapters_at_once_are_a_programming_error(tiny_base: Base) -> None:
    attach(tiny_base, Network(rank=4), seed=0)
    with pytest.raises(RuntimeError, match="detach"):
        attach(tiny_base, Network(rank=4), seed=0)


def test_on_a_half_base_the_adapter_is_fp32_and_dora_starts_neutral(tiny_base_path: Path) -> None:
    base = load_base(tiny_base_path, dtype=torch.float16)
    plain = predict(base)
    bank = attach(base, Network(method="dora", rank=4), seed=0)
    assert bank.weights.dtype == torch.float32
    torch.testing.assert_close(predict(base), plain, rtol=5e-3, atol=5e-3)

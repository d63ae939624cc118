"""A base held in 8 or 4 bits: against PEFT on bitsandbytes' own modules, in packs, scored, refused.

The numbers that training computes with are those that bitsandbytes' modules compute with, so the
tolerances are those of whole bases: what is rounded is rounded the same way on both sides.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import tiny_families
import torch
from peft import LoraConfig
from torch import Tensor, nn

from captioning import DatasetVersion, UserError
from training.checkpoints import list_checkpoints, load_checkpoint
from training.events import Event, PackMeasured, StepTaken, TrialStopped
from training.export import export_adapter
from training.families import Base, load_base
from training.frozen.quantised import QuantisedLinear, load_quantised
from training.frozen.sharding import whole
from training.group import Group
from training.loop import train
from training.pack.adapters import attach, attach_pack, detach, initial_adapter, target_layers
from training.pack.norms import input_norms
from training.recipe import Network, Recipe, trial_id
from training.run.job import SweepJob, TrialSpec
from training.run.probe import random_cache
from training.run.worker import Worker
from training.scoring.prompts import ScoringConfig
from training.scoring.scores import BaseScores, Score
from training.telemetry import base_bytes

FORMS = ("int8", "nf4")
CPU = torch.device("cpu")
# The length of a tensor's difference relative to the tensor's length, fp32; as for whole bases.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(path: Path, form: str) -> Base:
    return load_quantised(str(path), CPU, torch.float32, form)


def assert_near(found: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    scale, error = float(wanted.norm()), float((found - wanted).norm())
    assert error <= tolerance * scale, f"{what}: {error:.3g} of {scale:.3g}"


def linears_in_blocks(denoiser: Any) -> list[tuple[nn.Module, str, nn.Linear]]:
    """With their parents and names there: what is to be quantised. Blocks lie in blocks."""
    found = {
        id(child): (module, name, child)
        for block in denoiser.modules()
        if type(block).__name__ in denoiser._no_split_modules
        for module in block.modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear
    }
    return list(found.values())


def librarys_own(denoiser: Any, form: str) -> Any:
    """The denoiser with bitsandbytes' modules, as diffusers makes them on a GPU."""
    denoiser.train()  # else Linear8bitLt quantises activations on a CPU too
    for module, name, child in linears_in_blocks(denoiser):
        sizes = child.in_features, child.out_features, child.bias is not None
        made: Any
        if form == "nf4":
            options = {"compute_dtype": torch.float32, "quant_type": "nf4"}
            made = bitsandbytes.nn.Linear4bit(*sizes, **options)
        else:
            made = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        made.load_state_dict(child.state_dict())
        setattr(module, name, made.requires_grad_(False).to("cpu"))
    denoiser.is_loaded_in_4bit, denoiser.is_loaded_in_8bit = form == "nf4", form == "int8"
    return denoiser


def rounded(path: Path, form: str) -> Base:
    """A whole base with the numbers that its quantised weights stand for."""
    base = load_base(path)
    functional: Any = bitsandbytes.functional
    for _, _, layer in linears_in_blocks(base.denoiser):
        if form == "nf4":
            held = functional.quantize_4bit(
                layer.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            layer.weight.data = functional.dequantize_4bit(*held)
        else:
            numbers, scales, _ = functional.int8_vectorwise_quant(layer.weight.data.half())
            layer.weight.data = functional.int8_vectorwise_dequant(numbers, scales)
    return base


def inputs(base: Base, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Latents, timesteps, conditions and a target of two samples."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, base.latent_channels, 8, 8, generator=generator)
    told = {
        name: torch.randn(2, *shape, generator=generator)
        for name, shape in base.condition_shapes().items()
    }
    timesteps = torch.randint(1, 1000, (2,), generator=generator)
    return latents, timesteps, told, torch.randn(latents.shape, generator=generator)


def error(base: Base, seed: int) -> Tensor:
    latents, timesteps, told, target = inputs(base, seed)
    return (base.predict(latents, timesteps, told) - target).square().mean()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training_equals_peft_on_the_librarys_own_modules(
    tiny_base_path: Path, form: str, method: str
) -> None:
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    if (form, method) == ("int8", "dora"):
        # On a CPU PEFT loses an 8-bit layer's scales when it takes the norm of its weight.
        plain = rounded(tiny_base_path, form)
        unet = plain.denoiser
    else:
        plain = load_base(tiny_base_path)
        unet = librarys_own(plain.denoiser, form)
    torch.manual_seed(3)
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=2, target_modules=targets, use_dora=method == "dora")
    )
    base = load(tiny_base_path, form)
    network = Network.model_validate(
        {"method": method, "rank": 4, "alpha": 2.0, "targets": "attention+ff"}
        | ({"dora_axis": "output"} if method == "dora" else {})
    )
    bank = attach(base, network, seed=3)
    options = {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.01}
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    theirs = torch.optim.AdamW(trained, **options)
    row = nn.Parameter(bank.weights[0])
    row.grad = bank.grads[0]
    ours = torch.optim.AdamW([row], **options)
    for step in range(5):
        bank.zero_grad()
        loss, wanted = error(base, step), error(plain, step)
        assert_near(loss.detach(), wanted.detach(), f"loss of step {step}")
        loss.backward()
        wanted.backward()
        bank.collect_gradients()
        for optimizer in (theirs, ours):
            optimizer.step()
        theirs.zero_grad()
        bank.changed()
    found = bank.split(0, bank.weights[0])
    peft = {
        name.removesuffix(".default.weight"): parameter.detach()
        for name, parameter in unet.named_parameters()
        if ".lora_" in name
    }
    assert {".".join(key) for key in found} == peft.keys()
    for key, tensor in found.items():
        assert_near(tensor, peft[".".join(key)], str(key))


@pytest.mark.parametrize(("family", "form"), [("sdxl", "int8"), ("flux-dev", "nf4")])
def test_a_block_computes_with_the_numbers_that_its_weights_stand_for(
    family: str, form: str, tmp_path: Path
) -> None:
    path = tiny_families.build(family, tmp_path / "model")
    found, wanted, before = load(path, form), rounded(path, form), load_base(path)
    quantised = [m for m in found.denoiser.modules() if isinstance(m, QuantisedLinear)]
    assert len(quantised) == len(linears_in_blocks(before.denoiser)) > 10
    # Bytes: of the linear layers in the blocks a half or an eighth, their scales and tables aside.
    numbers = sum(module.weight.nbytes for module in quantised)
    whole_bytes = sum(4 * m.in_features * m.out_features for m in quantised)
    assert numbers == whole_bytes // (4 if form == "int8" else 8)
    assert base_bytes(found) < base_bytes(before) - (0.7 if form == "int8" else 0.6) * whole_bytes
    # LoRA of every linear layer, DoRA's two norms, and PiSSA, which needs the weights themselves.
    networks = [
        Network.model_validate({"rank": 2, "targets": "attention+ff", **more})
        for more in (
            {"method": "dora", "dora_axis": "input"},
            {"method": "dora", "dora_axis": "output"},
            {"init": "pissa"},
        )
    ]
    states = [initial_adapter(wanted, network, 1) for network in networks]
    # Singular vectors differ by what the processor rounds: 1.2e-4 was seen, and less on others.
    pissa_tolerance = 2e-4
    for network, state in zip(networks, states, strict=True):
        tolerance = pissa_tolerance if network.init == "pissa" else TOLERANCE
        for name, tensor in initial_adapter(found, network, 1).items():
            assert_near(tensor, state[name], name, tolerance)
    generator = torch.Generator().manual_seed(0)
    for state in states:
        for tensor in state.values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    for half in (False, True):
        # bf16 rounds every sum to 8 bits, and two ways to the same number to neighbours of it.
        tolerance = 0.05 if half else TOLERANCE
        gradients = []
        for base in (found, wanted):
            bank = attach_pack(base, list(zip(networks, states, strict=True)))
            latents, timesteps, told, target = (
                {name: tensor.repeat(3, *(1,) * (tensor.ndim - 1)) for name, tensor in one.items()}
                if isinstance(one, dict)
                else one.repeat(3, *(1,) * (one.ndim - 1))
                for one in inputs(base, 4)
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output = base.predict(latents, timesteps, told)  # type: ignore[arg-type]
            (output - target).square().mean().backward()
            bank.collect_gradients()
            gradients.append(bank.grads.clone())
            with bank.off(), torch.no_grad():
                gradients.append(base.predict(latents, timesteps, told))  # type: ignore[arg-type]
            detach(base)
        assert_near(gradients[0], gradients[2], "gradients", tolerance)
        assert_near(gradients[1], gradients[3], "of the bare base")


def test_doras_norms_are_those_of_the_dequantised_weight(tiny_base_path: Path) -> None:
    base, plain = load(tiny_base_path, "nf4"), rounded(tiny_base_path, "nf4")
    layers, wanted = (target_layers(one, Network(targets="attention+ff")) for one in (base, plain))
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        weight = wanted[name].weight
        assert torch.equal(whole(layer.weight), weight)
        down = torch.randn(1, 1, 2, weight.shape[1], generator=generator)
        up = torch.randn(1, 1, weight.shape[0], 2, generator=generator)
        squares = weight.square().sum(0)[None]
        found = input_norms([whole(layer.weight)], squares, down, up)
        built = (weight + up[0, 0] @ down[0, 0]).norm(dim=0)
        assert_near(found[0, 0], built, name)


def recipe(form: str = "nf4", **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": {"rank": 2},
        # A larger eps than Adam's own: else a gradient of pure rounding moves a weight by an lr.
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
        "steps": 4,
        "checkpoint_every": 2,
        "batch_size": 2,
        "base_precision": form,
    }
    return Recipe.model_validate({**data, **changes})


def run(job: SweepJob, stop_after: int | None = None) -> list[Event]:
    events: list[Event] = []

    def stopped() -> bool:
        steps = {e.step for e in events if isinstance(e, StepTaken)}
        return stop_after is not None and len(steps) >= stop_after

    worker = Worker(job, Group(0, 1), CPU, events.append, stopped, None, max_deaths=2)
    assert worker.run() is None
    return events


def last_adapter(spec: TrialSpec) -> dict[str, Tensor]:
    return load_checkpoint(list_checkpoints(spec.trial_dir)[-1].path).adapter


@pytest.mark.slow
def test_packed_solo_resumed_scored_and_exported(
    tiny_base_path: Path, frozen_dataset: DatasetVersion, tiny_clip_path: Path, tmp_path: Path
) -> None:
    networks: tuple[dict[str, Any], ...] = (
        {"rank": 4},
        {"rank": 2, "method": "dora", "dora_axis": "input"},
        {"rank": 2, "method": "dora", "dora_axis": "output", "init": "pissa"},
    )
    recipes = [recipe(network=network) for network in networks]
    scoring = ScoringConfig(
        prompts=("{subject}, smile", "{subject}, hat"),
        unrelated=("a house",),
        seeds=1,
        steps=2,
        guidance=1.0,
        bootstrap=100,
        embedder=str(tiny_clip_path),
    )

    def job(name: str, trials: list[Recipe], **more: Any) -> SweepJob:
        return SweepJob(
            base=str(tiny_base_path),
            dataset_path=str(frozen_dataset.path),
            latents_dir=str(tmp_path / "latents"),
            trials=tuple(
                TrialSpec(f"t{i}", recipe, tmp_path / name / f"t{i}")
                for i, recipe in enumerate(trials)
            ),
            score_dir=str(tmp_path / "base"),
            **{"scoring": None, **more},
        )

    packed_ones = job("packed", recipes)
    (pack,) = [e for e in run(packed_ones) if isinstance(e, PackMeasured)]
    assert pack.trials == ("t0", "t1", "t2")
    assert pack.base_bytes == base_bytes(load(tiny_base_path, "nf4"))

    # With a trial on the whole base, which is another pack; both are compared with it, bare.
    short = [recipe(form, network=networks[0], steps=2) for form in ("nf4", "auto")]
    mixed = job("mixed", short, scoring=scoring)
    packs = [(e.trials, e.base_bytes) for e in run(mixed) if isinstance(e, PackMeasured)]
    whole_bytes = base_bytes(load_base(tiny_base_path))
    assert packs == [(("t0",), pack.base_bytes), (("t1",), whole_bytes)]
    assert pack.base_bytes < whole_bytes
    (bare,) = (tmp_path / "base").glob("*")
    checkpoints = [list_checkpoints(spec.trial_dir)[-1].path for spec in mixed.trials]
    assert {Score.load(path).base_key for path in checkpoints} == {bare.name}
    assert BaseScores.load(bare).base_precision == "auto"
    # Alone, a quantised one is compared with its own.
    run(replace(mixed, trials=mixed.trials[:1]))
    (other,) = set((tmp_path / "base").glob("*")) - {bare}
    assert BaseScores.load(other).base_precision == "nf4"
    assert Score.load(checkpoints[0]).base_key == other.name
    assert len(list((tmp_path / "latents").glob("*"))) == 1  # encoded once for both forms
    # The form of the base does change what is learnt.
    rounded_base, whole_base = (last_adapter(spec) for spec in mixed.trials)
    apart = [float((whole_base[key] - tensor).abs().max()) for key, tensor in rounded_base.items()]
    assert max(apart) > 1e-4

    broken = job("broken", recipes, gradient_checkpointing=True)
    assert isinstance(run(broken, stop_after=2)[-1], TrialStopped)
    resumed = [e.step for e in run(broken) if isinstance(e, StepTaken) and e.trial == "t0"]
    assert resumed == [3, 4]
    for packed, again in zip(packed_ones.trials, broken.trials, strict=True):
        wanted = last_adapter(again)
        assert all(torch.equal(t, wanted[name]) for name, t in last_adapter(packed).items())

    alone = job("alone", recipes, trials_per_pack=1)
    run(alone)
    for packed, solo in zip(packed_ones.trials, alone.trials, strict=True):
        wanted = last_adapter(solo)
        for name, tensor in last_adapter(packed).items():
            largest = float(wanted[name].abs().max())
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5 * largest)
    base = load_base(tiny_base_path)
    for spec in packed_ones.trials:
        checkpoint = list_checkpoints(spec.trial_dir)[-1].path
        report = export_adapter(checkpoint, base, tmp_path / f"{spec.trial}.safetensors", "kohya")
        assert report.max_error < 0.02 * report.effect


def test_the_form_is_part_of_a_trials_name_and_of_no_older_one(
    tiny_dataset: DatasetVersion,
) -> None:
    @cache
    def name(form: str) -> str:
        return trial_id(tiny_dataset, "base", Recipe.model_validate({"base_precision": form}))

    assert name("auto") == trial_id(tiny_dataset, "base", Recipe())
    assert "base_precision" not in Recipe().canonical()
    assert len({name(form) for form in ("auto", *FORMS)}) == 3


def test_convolutions_stay_whole_and_are_trained_on_all_the_same(
    tiny_base_path: Path, tmp_path: Path
) -> None:
    base = load(tiny_base_path, "nf4")
    convolutions = [m for m in base.denoiser.modules() if isinstance(m, nn.Conv2d)]
    assert {m.weight.dtype for m in convolutions} == {torch.float32}
    wanted = recipe(network={"rank": 2, "targets": "attention+ff+conv"}, steps=1)
    train(base, random_cache(base, wanted), wanted, tmp_path / "trial")
    names = load_checkpoint(list_checkpoints(tmp_path / "trial")[-1].path).adapter
    assert any(".conv1." in name for name in names) and any(".to_q." in name for name in names)


def test_what_cannot_be_is_refused_before_a_base_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = str(tmp_path / "no base")
    # A device without kernels: torch's own that only knows shapes.
    with pytest.raises(UserError, match="has no nf4 on meta"):
        load_quantised(absent, torch.device("meta"), torch.float32, "nf4")
    specs = (TrialSpec("t0", recipe(), tmp_path),)
    with pytest.raises(UserError, match=r"nf4.*`strategy`"):
        SweepJob(absent, "", "", specs, None, "", strategy="fsdp")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"bitsandbytes.*8bit"):
        load_quantised(absent, CPU, torch.float32, "int8")
    with pytest.raises(UserError, match="no such folder"):  # asks for no package
        load_quantised(absent, CPU, torch.float32, "auto")

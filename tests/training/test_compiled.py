"""Blocks compiled by torch.compile: the same adapters, in every family and in packs that change.

Most tests have the compiler follow the code and run what it found without generating any
(`backend="eager"`), which shows that it sees all of a block; one generates code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import tiny_families
import torch
from torch import nn
from torch._dynamo.utils import counters

from captioning import UserError
from training.checkpoints import list_checkpoints, load_checkpoint
from training.compiled import add_up_checked, compile_blocks
from training.data.latents import LatentCache
from training.events import CompiledChecked, Event
from training.families import Base, load_base
from training.families.compiled_blocks import CompiledBlocks, is_compiled, repeated_blocks
from training.frozen.quantised import load_quantised
from training.loop import Callbacks, train_pack
from training.pack.bank import AdapterBank
from training.pack.layer import BankLinear
from training.pack.parts import DOWN, UP
from training.pack.slot import Trial
from training.recipe import Network, Recipe
from training.run.probe import random_cache
from training.scoring import sampling

FAMILIES = ["sdxl", "sd3", "flux-dev", "flux2-klein", "zimage", "qwen_image"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_programs() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    counters.clear()


def recipe(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "network": {"rank": 2},
        # A larger eps than Adam's own: else a gradient of pure rounding moves a weight by an lr.
        "optimizer": {"lr": 1e-2, "eps": 1e-3},
        "steps": 2,
        "checkpoint_every": 2,
        "batch_size": 1,
        "resolution": 64,
        "min_snr_gamma": None,
        "caption_dropout": 0.0,
    }
    return Recipe.model_validate({**data, **changes})


def mixed(**changes: Any) -> list[Recipe]:
    """LoRA and both DoRAs of several ranks; the first leaves the pack before the others."""
    dora = {"rank": 3, "method": "dora"}
    return [
        recipe(**{"steps": 1, "checkpoint_every": 1, **changes}),
        recipe(network={**dora, "dora_axis": "input"}, seed=1, **changes),
        recipe(network={**dora, "dora_axis": "output", "rank": 4}, seed=2, **changes),
    ]


def train_all(
    base: Base,
    recipes: list[Recipe],
    folder: Path,
    events: list[Event] | None = None,
    caches: list[LatentCache] | None = None,
    compiled: CompiledBlocks | None = None,
) -> list[dict[str, torch.Tensor]]:
    """The adapters of the last checkpoints."""

    def fail(trial: Trial, error: Exception) -> None:
        raise AssertionError(trial.id) from error

    caches = caches or [random_cache(base, recipes[0])] * len(recipes)
    trials = [Trial(folder / f"t{k}", own, caches[k]) for k, own in enumerate(recipes)]
    told = [] if events is None else events
    train_pack(base, trials, Callbacks(fail, on_event=told.append), compiled=compiled)
    last = [list_checkpoints(trial.trial_dir)[-1].path for trial in trials]
    return [load_checkpoint(path).adapter for path in last]


def assert_close(found: list[Any], expected: list[Any], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            error = float((one[name] - tensor).norm())
            assert error <= tolerance * float(tensor.norm()), name


def leave_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check computes as is written, which `refuse_eager_layers` would refuse."""
    monkeypatch.setattr(CompiledBlocks, "is_to_be_checked", lambda compiled: False)


def refuse_eager_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def outside(layer: BankLinear, x: torch.Tensor, tensors: Any) -> torch.Tensor:
        raise AssertionError("a layer computes outside of the compiled blocks")

    monkeypatch.setattr(BankLinear, "_packed", outside)


def follow_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since following each for every shape, or generating its code, takes a quarter of a minute."""
    monkeypatch.setattr(
        "training.compiled.repeated_blocks", lambda denoiser: repeated_blocks(denoiser)[:1]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_compiler_sees_whole_blocks_of_every_family(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(tiny_families.build(family, tmp_path / "base"))
    recipes = mixed(steps=1, checkpoint_every=1)[2:]
    expected = train_all(base, recipes, tmp_path / "plain")
    compiled = compile_blocks(base, backend="eager")
    leave_unchecked(monkeypatch)
    refuse_eager_layers(monkeypatch)
    assert_close(train_all(base, recipes, tmp_path / "compiled", compiled=compiled), expected, 1e-5)
    assert counters["stats"]["unique_graphs"] > 1
    assert not counters["graph_break"]


def test_a_pack_that_gets_smaller_with_a_teacher_and_activations_computed_again(
    tiny_base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, recipes = load_base(tiny_base_path), mixed(prior_weight=0.5, precision="bf16")
    expected = train_all(base, recipes, tmp_path / "plain")
    compiled = compile_blocks(base, backend="eager")
    base.denoiser.enable_gradient_checkpointing()
    leave_unchecked(monkeypatch)
    refuse_eager_layers(monkeypatch)
    assert_close(train_all(base, recipes, tmp_path / "compiled", compiled=compiled), expected, 2e-2)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_quantised_base(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_families.build("flux2-klein", tmp_path / "base")
    base = load_quantised(folder, CPU, torch.float32, form)
    recipes = [recipe(base_precision=form, steps=1, checkpoint_every=1)]
    expected = train_all(base, recipes, tmp_path / "plain")
    compiled = compile_blocks(base, backend="eager")
    leave_unchecked(monkeypatch)
    refuse_eager_layers(monkeypatch)
    assert_close(train_all(base, recipes, tmp_path / "compiled", compiled=compiled), expected, 1e-5)


def test_nested_ranks_beside_a_trained_text_encoder(
    tiny_base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow_one_block(monkeypatch)
    base, own = load_base(tiny_base_path), {"text_encoder": {"lr": 1e-2}}
    nested = {"rank": 4, "nested_ranks": [2, 4], **own}
    recipes = [recipe(network=nested, steps=4), recipe(network={"rank": 3, **own}, steps=4)]
    expected = train_all(base, recipes, tmp_path / "plain")
    compiled = compile_blocks(base, backend="eager")
    events: list[Event] = []
    found = train_all(base, recipes, tmp_path / "compiled", events, compiled=compiled)
    checked = [event.kept for event in events if isinstance(event, CompiledChecked)]
    assert checked and all(checked)
    assert_close(found, expected, 1e-5)


@pytest.mark.slow
def test_generated_code_gives_the_same_adapters_and_goes_on_bit_for_bit(
    tiny_base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow_one_block(monkeypatch)
    recipes = mixed(steps=3, checkpoint_every=1, batch_size=2)[2:]
    base = load_base(tiny_base_path)
    expected = train_all(base, recipes, tmp_path / "plain")
    compiled = compile_blocks(base)
    events: list[Event] = []
    whole = train_all(base, recipes, tmp_path / "whole", events, compiled=compiled)
    checked = [event for event in events if isinstance(event, CompiledChecked)]
    assert [event.kept for event in checked] == [True, True]  # of B's and of all gradients
    assert all(0 < event.difference < 1e-4 for event in checked)
    assert_close(whole, expected, 1e-4)
    short = [own.model_copy(update={"steps": 2}) for own in recipes]
    train_all(base, short, tmp_path / "broken", compiled=compiled)
    again = train_all(base, recipes, tmp_path / "broken", compiled=compiled)
    for one, other in zip(again, whole, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_compiled_base_is_not_trained_unchecked(tiny_base_path: Path, tmp_path: Path) -> None:
    base = load_base(tiny_base_path)
    compiled = compile_blocks(base, backend="eager")
    with pytest.raises(ValueError, match="to be checked"):
        train_all(base, mixed(), tmp_path)
    compiled.take_off()
    assert not is_compiled(base.denoiser)
    train_all(base, mixed()[:1], tmp_path)


def scaled(program: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    return lambda *given: tuple(1.01 * output for output in program(*given))


def broken(program: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    raise RuntimeError("no room for the compiler")


@pytest.mark.parametrize("backend", [scaled, broken])
def test_programs_that_compute_something_else_or_cannot_be_made(
    backend: Callable[..., Any],
    tiny_base_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.compiled.try_compiler", lambda device, backend: None)
    base, recipes = load_base(tiny_base_path), mixed()
    expected = train_all(base, recipes, tmp_path / "plain")
    compiled = compile_blocks(base, backend=backend)
    events: list[Event] = []
    found = train_all(base, recipes, tmp_path / "compiled", events, compiled=compiled)
    [checked] = [event for event in events if isinstance(event, CompiledChecked)]
    assert not checked.kept
    if backend is scaled:
        assert checked.difference > 1e-3
    else:
        assert "no room for the compiler" in checked.error
    assert not is_compiled(base.denoiser) and not compiled.is_on
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


class Passes:
    """A step's gradients of a small bank, with `harm` done to what the first pass adds up."""

    def __init__(self, harm: Callable[[AdapterBank], None]) -> None:
        torch.manual_seed(0)
        self.compiled = CompiledBlocks([], MagicMock())
        layer = nn.Linear(4, 6).requires_grad_(False)
        self.bank = AdapterBank({"layer": layer}, [Network(rank=2), Network(rank=3)])
        self.bank.weights.normal_()
        self.bank.changed()
        self.packed, self.harm, self.passes = BankLinear(layer, self.bank, 0), harm, 0

    def add_up(self) -> tuple[torch.Tensor, str | None]:
        losses = self.packed(torch.ones(2, 5, 4)).square().sum(dim=(1, 2))
        losses.sum().backward()
        self.passes += 1
        if self.passes == 1:
            self.harm(self.bank)
        return losses.detach(), None

    def check(self) -> Any:
        return add_up_checked(self.compiled, self.bank, "fp32", self.add_up)[2]


def of_first_group(bank: AdapterBank, part: str) -> torch.Tensor:
    return bank._added[0][part]


@pytest.mark.parametrize(
    ("harm", "difference"),
    [
        (lambda bank: None, 0.0),
        (lambda bank: of_first_group(bank, DOWN).mul_(1.5), 0.5),  # beside a right gradient of B
        (lambda bank: of_first_group(bank, UP)[:, 1].fill_(torch.nan), torch.inf),
    ],
)
def test_every_part_of_every_slot_is_compared(
    harm: Callable[[AdapterBank], None], difference: float
) -> None:
    right = Passes(lambda bank: None)
    right.check()
    passes = Passes(harm)
    event = passes.check()
    assert isinstance(event, CompiledChecked)
    assert event.difference == pytest.approx(difference)
    assert (event.kept, event.error) == (not difference, None)
    assert passes.passes == 2
    assert torch.equal(passes.bank.grads, right.bank.grads)


def test_slots_of_several_shapes_in_micro_batches(
    tiny_base_path: Path,
    make_cache: Callable[..., LatentCache],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    follow_one_block(monkeypatch)
    base = load_base(tiny_base_path)
    own = {"aspect_buckets": True, "bucket_step_px": 8, "accumulation": 2, "steps": 1}
    own["checkpoint_every"] = 1
    wide, square = (make_cache(base, buckets={size: 2}) for size in ((4, 12), (8, 8)))
    caches = [wide, square, wide]
    expected = train_all(base, mixed(**own), tmp_path / "plain", caches=caches)
    compiled = compile_blocks(base, shapes_vary=True, backend="eager")
    events: list[Event] = []
    found = train_all(base, mixed(**own), tmp_path / "compiled", events, caches, compiled=compiled)
    checked = [event for event in events if isinstance(event, CompiledChecked)]
    assert checked and all(event.kept for event in checked)
    assert_close(found, expected, 1e-5)


def test_pictures_are_made_uncompiled(tiny_base_path: Path) -> None:
    base = load_base(tiny_base_path)
    asked = {"steps": 2, "guidance": 2.0, "size_px": 64}
    expected = sampling.sample(base, ["a hat"], [0], **asked)
    compile_blocks(base, backend="eager")
    counters.clear()
    assert (sampling.sample(base, ["a hat"], [0], **asked) == expected).all()
    assert not counters["stats"]


def test_blocks_with_convolutions_stay_as_they_are(tiny_base_path: Path) -> None:
    blocks = repeated_blocks(load_base(tiny_base_path).denoiser)
    assert {type(block).__name__ for block in blocks} == {"BasicTransformerBlock"}


def test_a_machine_without_a_compiler_is_told_so(
    tiny_base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    base = load_base(tiny_base_path)
    with pytest.raises(UserError) as raised:
        compile_blocks(base)
    assert raised.value.where == "settings.yaml: compile"
    assert "C++ compiler" in raised.value.fix
    assert not is_compiled(base.denoiser)

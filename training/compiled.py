"""The blocks of a base's denoiser compiled by torch.compile, with the adapters on them.

A `Base` in, the same one out: in training its repeated blocks are compiled programs, forward and
backward, and what is between them stays as it is (diffusers calls this regional compilation).

A compiler is not believed: generated code has given wrong gradients without a word (torch 2.13 on
CPUs, for one sample with a transposed layout, by 4 %). So the steps after something was compiled
are computed again as they are written, and compared.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captioning import UserError
from training.events import CompiledChecked
from training.families import Base
from training.pack.bank import AdapterBank
from training.pack.layer import BankLinear

# Programs of one kind of block: for every width of it, and every number of trials in a pack as
# those that are finished leave it. PyTorch stops at 8 and goes on uncompiled.
MOST_PROGRAMS = 64
# By which share of its length a part of a slot's gradient may differ: orders of adding up are
# others, and half types round between two operations where a fused program does not.
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
# The step for which a program was made, and the next: in the first of all B is zero, and with it
# half of the gradients.
CHECKED_STEPS = 2

#: What torch.compile hands a traced program to, by name or as a function.
Backend = Callable[..., Any]
#: Has the layers add up a step's gradients: the losses, and what was said if memory ran out.
AddUp = Callable[[], tuple[Tensor, str | None]]


@dataclass
class CompiledBlocks:
    """What `compile_blocks` has changed in a base, and how far its programs have been checked."""

    blocks: list[nn.Module]
    hook: RemovableHandle
    programs: int = -1  # of this process, when they were last counted
    unchecked_steps: int = CHECKED_STEPS

    def is_to_be_checked(self) -> bool:
        """Whether the step that was just computed is."""
        if self.programs != (now := _programs()):
            self.programs, self.unchecked_steps = now, CHECKED_STEPS
        return self.unchecked_steps > 0

    def take_off(self) -> None:
        self.hook.remove()
        for block in self.blocks:
            block._compiled_call_impl = None  # as before `Module.compile`, which has no other way


def compile_blocks(
    base: Base, shapes_vary: bool = False, backend: str | Backend = "inductor"
) -> None:
    """Have the denoiser's blocks compiled as soon as they are trained on, once for every shape.

    Adapters may be put on and taken off afterwards. `shapes_vary`: from the second picture size on
    compile for all of them at once, which takes longer than for one. Raises UserError where nothing
    can be compiled.
    """
    _try_out(base.device, backend)
    # Gradients are added up in the bank's rows, which lie apart: no harm where none are copied.
    warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
    torch._dynamo.config.recompile_limit = MOST_PROGRAMS
    blocks = repeated_blocks(base.denoiser)
    for block in blocks:
        block.compile(backend=backend, dynamic=None if shapes_vary else False)

    def prepare(denoiser: nn.Module, inputs: Any) -> None:
        for block in blocks:
            for module in block.modules():
                if isinstance(module, BankLinear):
                    module.prepare_traced()

    base.compiled = CompiledBlocks(blocks, base.denoiser.register_forward_pre_hook(prepare))


@contextmanager
def uncompiled(base: Base) -> Iterator[None]:
    """Within the block the base computes as it is written.

    For pictures, too: they have shapes of their own, and are too few to compile for.
    """
    if base.compiled is None:  # the compiler's modules take seconds to import
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def add_up_checked(
    base: Base, bank: AdapterBank, precision: str, add_up: AddUp
) -> tuple[Tensor, str | None, CompiledChecked | None]:
    """Have `add_up` put a step's gradients into the bank, and compare them with uncompiled ones.

    Returns the losses, what `add_up` says about a lack of memory, and an event that tells the
    difference; the event is None where there was nothing to compare. If the difference is more
    than rounding, or the programs could not be made, the base is uncompiled from here on, and
    losses and gradients are the uncompiled ones.
    """
    try:
        losses, lack = add_up()
    except Exception as error:
        if base.compiled is None or not _is_the_compilers(error):
            raise
        _uncompile(base)
        bank.zero_grad()
        losses, lack = add_up()
        if lack is None:
            bank.collect_gradients()
        return losses, lack, CompiledChecked(difference=None, kept=False, error=_said(error))
    if lack is not None:
        return losses, lack, None
    bank.collect_gradients()
    compiled = base.compiled
    if compiled is None or not compiled.is_to_be_checked():
        return losses, None, None
    found = bank.grads.clone()
    bank.zero_grad()
    with uncompiled(base):
        expected, lack = add_up()
    if lack is not None:
        return losses, lack, None
    bank.collect_gradients()
    difference = _difference(bank, found)
    if difference is None:
        return expected, None, None  # the next step will tell
    if difference > TOLERANCES[precision]:
        _uncompile(base)
        return expected, None, CompiledChecked(difference, kept=False, error=None)
    compiled.unchecked_steps -= 1
    bank.grads.copy_(found)
    return losses, None, CompiledChecked(difference, kept=True, error=None)


def _difference(bank: AdapterBank, found: Tensor) -> float | None:
    """The largest of all slots and parts, of their length in the bank; None if all overflowed.

    Infinite where `found` is not finite and the bank's is.  # (K, P)
    """
    largest: float | None = None
    for slot, row in enumerate(bank.grads):
        other = bank.split(slot, found[slot])
        apart: dict[str, float] = {}
        length: dict[str, float] = {}
        for (name, part), tensor in bank.split(slot, row).items():
            change = (other[name, part] - tensor).square().sum()
            apart[part] = apart.get(part, 0.0) + float(change)
            length[part] = length.get(part, 0.0) + float(tensor.square().sum())
        for part, square in length.items():
            if not math.isfinite(square) or square == 0:
                continue
            share = math.sqrt(apart[part] / square) if math.isfinite(apart[part]) else math.inf
            largest = share if largest is None else max(largest, share)
    return largest


def _uncompile(base: Base) -> None:
    if base.compiled is not None:
        base.compiled.take_off()
        base.compiled = None


def repeated_blocks(denoiser: Any) -> list[nn.Module]:
    """What diffusers compiles of a model; for SD3, of which it does not say, what it never splits.

    Blocks with convolutions are left out.
    """
    names = set(getattr(denoiser, "_repeated_blocks", None) or denoiser._no_split_modules)
    return [
        module
        for module in denoiser.modules()
        if type(module).__name__ in names
        and not any(isinstance(inner, nn.Conv2d) for inner in module.modules())
    ]


def _programs() -> int:
    """How many programs this process has compiled."""
    import torch._dynamo.utils

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _is_the_compilers(error: Exception) -> bool:
    import torch._dynamo

    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


def _said(error: Exception) -> str:
    """Its name and first two lines: those of a backend's failure name the backend, then say it."""
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:2]])


def _try_out(device: torch.device, backend: str | Backend) -> None:
    import torch._dynamo

    def add_one(x: Tensor) -> Tensor:
        return x + 1

    try:
        torch.compile(add_one, backend=backend)(torch.zeros(2, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(
            "settings.yaml: compile",
            f"torch.compile fails on this machine ({_said(error)})",
            "install a C++ compiler (and Triton, for a GPU), or set it to false",
        ) from error

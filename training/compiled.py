"""The blocks of a base's denoiser compiled by torch.compile, with the adapters on them.

A `Base` in, the same one out: in training its repeated blocks are compiled programs, forward and
backward, and what is between them stays as it is (diffusers calls this regional compilation).

A compiler is not believed: generated code has given wrong gradients without a word (torch 2.13 on
CPUs, for one sample with a transposed layout, by 4 %). So a step in which something was
compiled is computed again as it is written, and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captioning import UserError
from training.families import Base
from training.pack.bank import AdapterBank
from training.pack.layer import BankLinear

# Programs of one kind of block: for every width of it, and every number of trials in a pack as
# those that are finished leave it. PyTorch stops at 8 and goes on uncompiled.
MOST_PROGRAMS = 64
# By which share of its norm a slot's gradient may differ: orders of adding up are others, and half
# types round some of what is between two operations where a fused program does not.
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}

#: What torch.compile hands a traced program to, by name or as a function.
Backend = Callable[..., Any]
#: Has the layers add up a step's gradients: the losses, and what was said if memory ran out.
AddUp = Callable[[], tuple[Tensor, str | None]]


@dataclass
class CompiledBlocks:
    """What `compile_blocks` has changed in a base, and whether its programs have been checked."""

    blocks: list[nn.Module]
    hook: RemovableHandle
    checked: int = field(default_factory=lambda: _programs())  # programs that there were then

    @property
    def is_checked(self) -> bool:
        return self.checked == _programs()

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


def check_programs(
    base: Base, bank: AdapterBank, precision: str, losses: Tensor, add_up_again: AddUp
) -> tuple[Tensor, str | None, float | None]:
    """Compare the bank's gradients with uncompiled ones, if something was compiled for them.

    Returns the step's losses, what `add_up_again` (which has the layers add the same gradients up
    again) says of a lack of memory, and by which share of a slot's gradient the two differ at most;
    None where there was nothing to compare. If that is more than rounding, the base is uncompiled
    from here on, and losses and gradients are the uncompiled ones.
    """
    compiled = base.compiled
    if compiled is None or compiled.is_checked:
        return losses, None, None
    found = bank.grads.clone()
    bank.zero_grad()
    with uncompiled(base):
        expected, lack = add_up_again()
    if lack is not None:
        return losses, lack, None
    bank.collect_gradients()
    norms = torch.linalg.vector_norm(bank.grads, dim=1)
    shares = torch.linalg.vector_norm(found - bank.grads, dim=1) / norms  # (K,)
    known = shares[shares.isfinite()]  # others overflowed, or are zero
    if len(known) == 0:
        return expected, None, None  # the next step will tell
    difference = float(known.max())
    if difference > TOLERANCES[precision]:
        compiled.take_off()
        base.compiled = None
        return expected, None, difference
    compiled.checked = _programs()
    bank.grads.copy_(found)
    return losses, None, difference


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


def _try_out(device: torch.device, backend: str | Backend) -> None:
    import torch._dynamo

    def add_one(x: Tensor) -> Tensor:
        return x + 1

    try:
        torch.compile(add_one, backend=backend)(torch.zeros(2, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            "settings.yaml: compile",
            f"torch.compile fails on this machine ({type(error).__name__}: {said})",
            "install a C++ compiler (and Triton, for a GPU), or set it to false",
        ) from error

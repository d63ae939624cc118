"""The blocks of a base's denoiser compiled by torch.compile, with the adapters on them.

In training the denoiser's repeated blocks are compiled programs, forward and backward, and what is
between them stays as it is (diffusers calls this regional compilation). A `Base` in, what was
changed in it out.

A compiler is not believed: generated code has given wrong gradients without a word (torch 2.13 on
CPUs, for one sample with a transposed layout, by 4 %). So the first steps of every
new program are computed again without it, and the gradients are compared.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.events import CompiledChecked
from training.families import Base
from training.families.compiled_blocks import (
    Backend,
    CompiledBlocks,
    first_lines,
    repeated_blocks,
    try_compiler,
)
from training.pack.bank import AdapterBank
from training.pack.layer import BankLinear

# How many programs one kind of block may have: one for every width of the block and every number
# of trials in the pack, which falls as trials finish. PyTorch stops at 8 and goes on uncompiled.
MOST_PROGRAMS = 64
# By which share of its length a part of a slot's gradient may differ. A compiled program adds up in
# another order, and half types round between two operations where a fused program does not.
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}

#: Lets the layers add up a step's gradients; returns the losses and, if memory ran out, the error's
#: first words.
AddUp = Callable[[], tuple[Tensor, str | None]]


def compile_blocks(
    base: Base, shapes_vary: bool = False, backend: str | Backend = "inductor"
) -> CompiledBlocks:
    """Have the denoiser's blocks compiled as soon as they are trained on, once for every shape.

    `train_pack` is to be given what this returns, so that the programs are checked. Adapters may be
    put on and taken off afterwards. With `shapes_vary` the second picture size is compiled for all
    sizes at once, which takes longer than for one. Raises UserError where nothing can be compiled.
    """
    try_compiler(base.device, backend)
    # The gradients' layout differs because they are views of the bank's rows. The warning is about
    # copies, and none are made here.
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

    return CompiledBlocks(blocks, base.denoiser.register_forward_pre_hook(prepare))


def add_up_checked(
    compiled: CompiledBlocks | None, bank: AdapterBank, precision: str, add_up: AddUp
) -> tuple[Tensor, str | None, CompiledChecked | None]:
    """Have `add_up` put a step's gradients into the bank, and compare them with uncompiled ones.

    Returns the losses, what `add_up` says about a lack of memory, and an event that tells the
    difference; the event is None where there was nothing to compare. If the difference is more
    than rounding, or the programs could not be made, `compiled` is taken off its base, and losses
    and gradients are the uncompiled ones.
    """
    try:
        losses, lack = add_up()
    except Exception as error:
        if compiled is None or not compiled.is_on or not _is_the_compilers(error):
            raise
        compiled.take_off()
        bank.zero_grad()
        losses, lack = add_up()
        if lack is None:
            bank.collect_gradients()
        return losses, lack, CompiledChecked(difference=None, kept=False, error=first_lines(error))
    if lack is not None:
        return losses, lack, None
    bank.collect_gradients()
    if compiled is None or not compiled.is_on or not compiled.is_to_be_checked():
        return losses, None, None
    found = bank.grads.clone()
    bank.zero_grad()
    with torch.compiler.set_stance("force_eager"):
        expected, lack = add_up()
    if lack is not None:
        return losses, lack, None
    bank.collect_gradients()
    difference = _difference(bank, found)
    if difference is None:
        return expected, None, None  # the next step will tell
    if difference > TOLERANCES[precision]:
        compiled.take_off()
        return expected, None, CompiledChecked(difference, kept=False, error=None)
    compiled.unchecked_steps -= 1
    bank.grads.copy_(found)
    return losses, None, CompiledChecked(difference, kept=True, error=None)


def _difference(bank: AdapterBank, found: Tensor) -> float | None:
    """The largest difference of a part of a slot's gradient, as a share of its length in the bank.

    Infinite where `found` is not finite and the bank's gradient is; None if all of them overflowed.
    # (K, P)
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


def _is_the_compilers(error: Exception) -> bool:
    import torch._dynamo

    return isinstance(error, torch._dynamo.exc.TorchDynamoException)

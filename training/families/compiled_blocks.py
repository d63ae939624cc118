"""The blocks of a denoiser that are compiled by torch.compile, and how to do without the programs.

A denoiser in, what was changed in it out. Nothing here knows adapters: `training.compiled` puts the
blocks under the compiler and compares what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captioning import UserError

# The steps that are checked after a program was made: the one for which it was made, and the next,
# since in the very first step B is zero, and with it half of the gradients.
CHECKED_STEPS = 2

#: What torch.compile hands a traced program to, by name or as a function.
Backend = Callable[..., Any]


@dataclass
class CompiledBlocks:
    """What `compile_blocks` has changed in a base, and how far its programs have been checked."""

    blocks: list[nn.Module]
    hook: RemovableHandle
    programs: int = -1  # of this process, when they were last counted
    unchecked_steps: int = CHECKED_STEPS
    is_on: bool = True  # False: the base computes as it is written again

    def is_to_be_checked(self) -> bool:
        """Whether the step that was just computed has to be compared with an uncompiled one."""
        if self.programs != (now := _programs()):
            self.programs, self.unchecked_steps = now, CHECKED_STEPS
        return self.unchecked_steps > 0

    def take_off(self) -> None:
        """Let the base compute as it is written from here on."""
        self.hook.remove()
        for block in self.blocks:
            block._compiled_call_impl = None  # PyTorch has no public way to undo `compile`
        self.is_on = False


def is_compiled(denoiser: nn.Module) -> bool:
    """Whether any block is compiled: `Module.compile` stores a compiled call in the module."""
    return any(module._compiled_call_impl is not None for module in denoiser.modules())


@contextmanager
def uncompiled(denoiser: nn.Module) -> Iterator[None]:
    """Within the block the denoiser computes as it is written.

    Pictures are drawn this way too: they have shapes of their own, and are too few to compile for.
    """
    if not is_compiled(denoiser):  # the compiler's modules take seconds to import
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def repeated_blocks(denoiser: Any) -> list[nn.Module]:
    """The blocks that diffusers would compile, without those that have convolutions.

    diffusers does not say which they are in SD3; there they are the ones that it never splits.
    """
    names = set(getattr(denoiser, "_repeated_blocks", None) or denoiser._no_split_modules)
    return [
        module
        for module in denoiser.modules()
        if type(module).__name__ in names
        and not any(isinstance(inner, nn.Conv2d) for inner in module.modules())
    ]


def first_lines(error: Exception) -> str:
    """The error's name and first two lines: a backend's failure names the backend, then says it."""
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:2]])


def try_compiler(device: torch.device, backend: str | Backend) -> None:
    """Compile one addition; UserError where torch.compile fails on this machine."""
    import torch._dynamo

    def add_one(x: Tensor) -> Tensor:
        return x + 1

    try:
        torch.compile(add_one, backend=backend)(torch.zeros(2, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(
            "settings.yaml: compile",
            f"torch.compile fails on this machine ({first_lines(error)})",
            "install a C++ compiler (and Triton, for a GPU), or set it to false",
        ) from error


def _programs() -> int:
    """How many programs this process has compiled."""
    import torch._dynamo.utils

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

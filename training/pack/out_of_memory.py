"""How a failed allocation is recognised, and how its memory is given back.

An error in, plain answers out; nothing is decided here about what to do without the memory.
"""

from __future__ import annotations

import gc

import torch

# The words of PyTorch's CPU allocator (c10/core/impl/alloc_cpu.cpp), and those of C++ for memory
# that does not come from it.
_CPU_WORDS = ("DefaultCPUAllocator", "bad_alloc")
# All that oneDNN says when it finds no memory for the code of a convolution.
_ONEDNN_WORDS = "could not create a primitive"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the accelerator or in the host's memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(error).strip()
    return isinstance(error, RuntimeError) and (
        words == _ONEDNN_WORDS or any(word in words for word in _CPU_WORDS)
    )


def first_words(error: BaseException) -> str:
    """The first line of an error, to be kept in its place: the error itself keeps tensors alive."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def free_cached(device: torch.device) -> None:
    """Give back the memory that the failed step has left in caches, so that other sizes fit."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""A packed linear layer in plain differentiable operations, which a compiler can see through.

It computes the same numbers as `training.pack.layer`, up to rounding. That module adds gradients to
the bank's tensors by itself; here autograd does, since a leaf's `grad` is the bank's tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.frozen.quantised import frozen_product


@dataclass(frozen=True)
class Leaves:
    """What one layer computes with, all fp32, in the shapes of `LayerTensors`."""

    down: Tensor
    up: Tensor
    input_gain: Tensor | None
    output_gain: Tensor | None


def leaf(tensor: Tensor, grad: Tensor | None) -> Tensor:
    """The same numbers as a leaf of the graph, whose gradient autograd adds to `grad`."""
    own = tensor.detach().requires_grad_()
    own.grad = grad
    return own


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, leaves: Leaves) -> Tensor:
    """y = (W·(g∘x) + B·A·(g∘x)) ∘ h + bias in the type of `x`.  # (N, ..., in) -> (N, ..., out)"""
    down, up = leaves.down.to(x.dtype), leaves.up.to(x.dtype)
    inputs = x.reshape(len(down), -1, x.shape[-1])  # (K, n, in)
    if leaves.input_gain is not None:
        inputs = (inputs * leaves.input_gain).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    early_bias = bias if leaves.output_gain is None else None
    output = frozen_product(inputs, weight, early_bias)  # (K, n, out)
    hidden = torch.bmm(inputs, down.mT)  # (K, n, R)
    output = torch.baddbmm(output, hidden, up.mT)
    if leaves.output_gain is not None:
        output = output * leaves.output_gain
        output = (output if bias is None else output + bias).to(x.dtype)
    return output.reshape(*x.shape[:-1], output.shape[-1])

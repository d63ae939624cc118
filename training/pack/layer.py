"""A frozen linear layer with K low-rank updates on it, each for its own share of the batch.

Inputs in, outputs out; the gradients of the updates are added to the bank's own tensors. Three
products forward and five back, whatever K is: small models wait for launches, not for numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training.frozen.quantised import computed, is_quantised, product
from training.pack.parts import Layer
from training.pack.traced import Leaves, leaf, packed_linear

if TYPE_CHECKING:
    from training.pack.bank import AdapterBank


@dataclass(frozen=True)
class LayerTensors:
    """What one layer computes with: K adapters, or the one that acts alone (then K is 1).

    Factors are in the type of the computation, gains and gradients in fp32.
    """

    down: Tensor  # (K, R, in); for a kernel (K, R·cells, in), see `by_cell`
    up: Tensor  # (K, out, R), times alpha/rank
    input_gain: Tensor | None  # (K, 1, in); DoRA's magnitude/norm, 1 for other slots
    output_gain: Tensor | None  # (K, 1, out)
    down_grad: Tensor
    up_grad: Tensor
    input_gain_grad: Tensor | None
    output_gain_grad: Tensor | None


class BankLayer(nn.Module, ABC):
    """Stands in the base for `base_layer` as long as the bank is on it."""

    def __init__(self, base_layer: Layer, bank: AdapterBank, index: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bank = bank
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        """Rows of the batch go to the slots in order, the same number to each."""
        if self.bank.is_off:
            bare: Tensor = self.base_layer(x)
            return bare
        dtype = _dtype(x)
        return self._packed(x.to(dtype), self.bank.layer_tensors(self._index, dtype))

    @abstractmethod
    def _packed(self, x: Tensor, layer: LayerTensors) -> Tensor:
        """The output with every slot's update on its own rows."""


def _dtype(x: Tensor) -> torch.dtype:
    """The type that a layer computes in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class BankLinear(BankLayer):
    """Stands for a linear layer.  # (N, ..., in) -> (N, ..., out)"""

    def __init__(self, base_layer: Layer, bank: AdapterBank, index: int) -> None:
        super().__init__(base_layer, bank, index)
        self._leaves: Leaves | None = None
        self._leaves_are_of: LayerTensors | None = None

    def prepare_traced(self) -> None:
        """To be called before every pass in which this layer is part of a compiled block.

        The bank's tensors are looked up here, since a compiler should not follow that.
        """
        layer = self.bank.layer_tensors(self._index, torch.float32)
        if layer is self._leaves_are_of:
            return
        self._leaves_are_of = layer
        in_gain, out_gain = layer.input_gain, layer.output_gain
        self._leaves = Leaves(
            leaf(layer.down, layer.down_grad),
            leaf(layer.up, layer.up_grad),
            None if in_gain is None else leaf(in_gain, layer.input_gain_grad),
            None if out_gain is None else leaf(out_gain, layer.output_gain_grad),
        )

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() or self.bank.is_off:
            return super().forward(x)
        assert self._leaves is not None, "prepare_traced was not called"
        inner = self.base_layer
        return packed_linear(x.to(_dtype(x)), inner.weight, inner.bias, self._leaves)

    def _packed(self, x: Tensor, layer: LayerTensors) -> Tensor:
        weight, bias = self.base_layer.weight, self.base_layer.bias
        output: Tensor = _PackedLinear.apply(x, self.bank.anchor, weight, bias, layer)
        return output


class _PackedLinear(torch.autograd.Function):
    """y = (W·(g∘x) + B·A·(g∘x)) ∘ h + bias, with DoRA's gains g (input axis) and h (output axis).

    The gains' norms carry no gradient (Liu et al. 2024, section 4.3; PEFT does the same).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: LayerTensors,
    ) -> Tensor:
        inputs = x.reshape(len(layer.down), -1, x.shape[-1])  # (K, n, in)
        scaled = inputs
        if layer.input_gain is not None:
            scaled = (inputs * layer.input_gain).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        early_bias = bias if layer.output_gain is None else None
        direction = product(scaled, weight, early_bias)  # (K, n, out)
        hidden = torch.bmm(scaled, layer.down.mT)  # (K, n, R)
        direction.baddbmm_(hidden, layer.up.mT)
        output = direction
        if layer.output_gain is not None:
            output = direction * layer.output_gain
            output = (output if bias is None else output + bias).to(x.dtype)
        ctx.layer, ctx.shape = layer, x.shape
        # It is not saved as a tensor, which might come back without its scales.
        ctx.quantised = weight if is_quantised(weight) else None
        ctx.save_for_backward(
            weight if ctx.quantised is None else None,
            scaled,
            hidden,
            inputs if layer.input_gain is not None else None,
            direction if layer.output_gain is not None else None,
        )
        return output.reshape(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        layer: LayerTensors = ctx.layer
        weight, scaled, hidden, inputs, direction = ctx.saved_tensors
        grad = grad.reshape(len(layer.down), -1, grad.shape[-1])  # (K, n, out)
        if layer.output_gain is not None and layer.output_gain_grad is not None:
            layer.output_gain_grad.add_((grad * direction).sum(1, keepdim=True))
            grad = (grad * layer.output_gain).to(scaled.dtype)
        add_product(layer.up_grad, grad.mT, hidden)
        hidden_grad = torch.bmm(grad, layer.up)  # (K, n, R)
        add_product(layer.down_grad, hidden_grad.mT, scaled)
        if not ctx.needs_input_grad[0] and layer.input_gain is None:
            return None, None, None, None, None
        weight = weight if ctx.quantised is None else ctx.quantised
        x_grad = torch.matmul(grad, computed(weight, grad.dtype))  # (K, n, in)
        x_grad.baddbmm_(hidden_grad, layer.down)
        if layer.input_gain is not None and layer.input_gain_grad is not None:
            layer.input_gain_grad.add_((x_grad * inputs).sum(1, keepdim=True))
            x_grad = (x_grad * layer.input_gain).to(scaled.dtype)
        return x_grad.reshape(ctx.shape), None, None, None, None


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left·right; gradients add up in fp32, whatever they were computed in."""
    # On a CPU, PyTorch computes one product after the other if the total is not contiguous.
    at_once = total.is_cuda or total.is_contiguous()
    if at_once and total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))

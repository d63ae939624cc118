"""A frozen convolution with K low-rank updates on it, each for its own share of the batch.

Inputs in, outputs out; the gradients of the updates are added to the bank's own tensors. The K
convolutions down to the rank are one batched product and a sum over the kernel's cells: the rank
is small, so the product's R·cells channels are fewer than the unfolded input's in·cells, and no
step depends on which algorithm a library takes for grouped convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from training.pack.layer import BankLayer, LayerTensors, add_product

Pair = tuple[int, int]


def by_cell(down: Tensor, cells: int) -> Tensor:
    """Factors in the rows' order, as the layers take them: a row for every rank and cell.

    The cells come last to first, which makes the sum over them one of `F.fold`.
    # (..., R, in·cells) -> (..., R·cells, in)
    """
    if cells == 1:
        return down
    return down.unflatten(-1, (-1, cells)).mT.flip(-2).flatten(-3, -2).contiguous()


def by_channel(down: Tensor, cells: int) -> Tensor:
    """The inverse of `by_cell`.  # (..., R·cells, in) -> (..., R, in·cells)"""
    if cells == 1:
        return down
    return down.unflatten(-2, (-1, cells)).flip(-2).mT.flatten(-2)


@dataclass(frozen=True)
class Window:
    """Where the cells of a convolution's kernel lie over an input of one size."""

    size: Pair  # of the picture
    kernel: Pair
    stride: Pair
    padding: Pair

    @property
    def is_cell(self) -> bool:
        """Whether every output cell depends on one input cell alone, the one that it lies on."""
        return self.kernel == self.stride == (1, 1)

    @property
    def margin(self) -> Pair:
        """The padding of the transposed convolution, whose windows are those of `F.fold`."""
        return self._pair(lambda axis: self.kernel[axis] - 1 - self.padding[axis])

    @property
    def dense(self) -> Pair:
        """The size of the output if the stride were 1."""
        return self._pair(
            lambda axis: self.size[axis] + 2 * self.padding[axis] - self.kernel[axis] + 1
        )

    def add_cells(self, products: Tensor) -> Tensor:
        """The convolution, made of the products of every input cell with every cell of the kernel.

        # (N, R·cells, h·w) -> (N, R, h'·w')
        """
        if self.is_cell:
            return products
        dense = F.fold(products, self.dense, self.kernel, padding=self.margin)  # (N, R, ., .)
        return dense[:, :, :: self.stride[0], :: self.stride[1]].flatten(2)

    def spread_cells(self, grad: Tensor) -> Tensor:
        """The gradient of `add_cells`.  # (N, R, h'·w') -> (N, R·cells, h·w)"""
        if self.is_cell:
            return grad
        (height, width), (top, left) = self.dense, self.margin
        count, rank, _ = grad.shape
        padded = grad.new_zeros(count, rank, height + 2 * top, width + 2 * left)
        inner = padded[:, :, top : top + height, left : left + width]
        strided = inner[:, :, :: self.stride[0], :: self.stride[1]]
        strided.copy_(grad.view(strided.shape))
        windows = padded.unfold(2, self.kernel[0], 1).unfold(3, self.kernel[1], 1)
        # (N, R, h, w, kernel height, kernel width)
        return windows.permute(0, 1, 4, 5, 2, 3).reshape(count, -1, self.size[0] * self.size[1])

    @staticmethod
    def _pair(of_axis: Any) -> Pair:
        return of_axis(0), of_axis(1)


class BankConv(BankLayer):
    """Stands for a convolution.  # (N, in, h, w) -> (N, out, h', w')"""

    def _packed(self, x: Tensor, layer: LayerTensors) -> Tensor:
        base: Any = self.base_layer
        window = Window((x.shape[-2], x.shape[-1]), base.kernel_size, base.stride, base.padding)
        anchor = self.bank.anchor
        output: Tensor = _PackedConv.apply(x, anchor, base.weight, base.bias, layer, window)
        return output


class _PackedConv(torch.autograd.Function):
    """y = (W * (g∘x) + B·(A * (g∘x))) ∘ h + bias: `_PackedLinear` with a convolution for W and A.

    The norms of DoRA's gains g (input channels) and h (output channels) carry no gradient either.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: LayerTensors,
        window: Window,
    ) -> Tensor:
        slots, count = len(layer.down), len(x)
        inputs = x.reshape(slots, -1, x.shape[1], window.size[0] * window.size[1])  # (K, n, in, hw)
        scaled = inputs
        if layer.input_gain is not None:
            scaled = (inputs * layer.input_gain.unsqueeze(-1)).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        early_bias = bias if layer.output_gain is None else None
        output = F.conv2d(
            scaled.view(x.shape), weight.to(x.dtype), early_bias, window.stride, window.padding
        ).contiguous()  # (N, out, h', w')
        down, up = _for_samples(layer.down, count), _for_samples(layer.up, count)
        hidden = window.add_cells(torch.bmm(down, scaled.flatten(0, 1)))  # (N, R, h'w')
        output.flatten(2).baddbmm_(up, hidden)
        direction = output
        if layer.output_gain is not None:
            gain = layer.output_gain.unsqueeze(-1)  # (K, 1, out, 1)
            output = (direction.view(slots, -1, *direction.shape[1:]).flatten(3) * gain).view(
                direction.shape
            )
            if bias is not None:
                output = output + bias[:, None, None]
            output = output.to(x.dtype)
        ctx.layer, ctx.window, ctx.shape = layer, window, x.shape
        ctx.save_for_backward(
            weight,
            scaled,
            hidden,
            inputs if layer.input_gain is not None else None,
            direction if layer.output_gain is not None else None,
        )
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        layer: LayerTensors = ctx.layer
        window: Window = ctx.window
        weight, scaled, hidden, inputs, direction = ctx.saved_tensors
        slots, count = len(layer.down), len(grad)
        shape = grad.shape  # (N, out, h', w')
        grad = grad.reshape(slots, -1, shape[1], shape[2] * shape[3])  # (K, n, out, h'w')
        if layer.output_gain is not None and layer.output_gain_grad is not None:
            product = grad * direction.view(grad.shape)
            _add_cells_of_slots(layer.output_gain_grad, product)
            grad = (grad * layer.output_gain.unsqueeze(-1)).to(scaled.dtype)
        grad, samples = grad.flatten(0, 1), scaled.flatten(0, 1)
        down, up = _for_samples(layer.down, count), _for_samples(layer.up, count)
        _add_product(layer.up_grad, grad, hidden.mT)
        cells_grad = window.spread_cells(torch.bmm(up.mT, grad))  # (N, R·cells, hw)
        _add_product(layer.down_grad, cells_grad, samples.mT)
        if not ctx.needs_input_grad[0] and layer.input_gain is None:
            return None, None, None, None, None, None
        x_grad = conv2d_input(
            ctx.shape, weight.to(grad.dtype), grad.view(shape), window.stride, window.padding
        ).contiguous()
        x_grad.flatten(2).baddbmm_(down.mT, cells_grad)
        if layer.input_gain is not None and layer.input_gain_grad is not None:
            of_slots = x_grad.view(inputs.shape)
            _add_cells_of_slots(layer.input_gain_grad, of_slots * inputs)
            x_grad = (of_slots * layer.input_gain.unsqueeze(-1)).to(scaled.dtype).view(ctx.shape)
        return x_grad, None, None, None, None, None


def _for_samples(factors: Tensor, count: int) -> Tensor:
    """Every slot's factors once for each of its samples.  # (K, a, b) -> (N, a, b)"""
    each = count // len(factors)
    return factors if each == 1 else factors.repeat_interleave(each, dim=0, output_size=count)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += the sum of left·right over every slot's samples; sums are in fp32."""
    if len(left) == len(total):
        add_product(total, left, right)
    else:
        product = torch.bmm(left, right).unflatten(0, (len(total), -1))
        total.add_(product.sum(1, dtype=total.dtype))


def _add_cells_of_slots(total: Tensor, product: Tensor) -> None:
    """total += the sum of every channel over samples and cells.  # (K, 1, c), (K, n, c, hw)"""
    total.add_(product.sum((1, 3), dtype=total.dtype).unsqueeze(1))

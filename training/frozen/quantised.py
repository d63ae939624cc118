"""A frozen base whose linear layers are held in 8 or 4 bits, as QLoRA trains on one.

A base's folder in, a `Base` out whose blocks hold their weights as bitsandbytes stores them; and
the two products that a layer's forward and backward pass need of such a weight. Adapters, their
gradients and optimisers are no part of it, and neither are the VAE and the text encoders.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captioning import UserError
from training.families import Base, load_base

#: The forms that `Recipe.base_precision` names, the least rounded first.
BASE_PRECISIONS = ("auto", "int8", "nf4")
# The largest number of int8; it stands for the largest number of a row (bitsandbytes).
INT8_LARGEST = 127


def load_quantised(
    path_or_id: str, device: torch.device, dtype: torch.dtype, base_precision: str
) -> Base:
    """`load_base`, with the linear layers of the denoiser's blocks in the form `base_precision`.

    int8: a scale for every row, its largest number over 127 (Dettmers et al. 2022, LLM.int8()'s
    weights; activations are not quantised, since outliers are found over a whole batch, and a
    sample's numbers would depend on the samples beside it). nf4: 4-bit NormalFloat in blocks of 64
    with scales of 8 bits (Dettmers et al. 2023, QLoRA, section 3). auto: nothing is quantised, as
    with `load_base`. Other layers (convolutions, norms, all before and behind the blocks) are in
    `dtype`, and so are all products.

    The base is read into the host's memory first, whole and in `dtype`, and quantised layer by
    layer on `device`, where nothing larger than a layer of it has ever been. Raises UserError as
    `load_base` does, and where bitsandbytes is not installed or cannot quantise on `device`.
    """
    if base_precision == "auto":
        return load_base(path_or_id, device, dtype)
    _try_out(base_precision, device)
    base = load_base(path_or_id, "cpu", dtype)
    for block in _blocks(base.denoiser):
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, QuantisedLinear(child, base_precision, device))
    base.denoiser.to(device)
    base.device = device
    return base


def _blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The transformer's or UNet's blocks, which diffusers never splits over devices."""
    names = set(denoiser._no_split_modules)  # type: ignore[arg-type]
    return [module for module in denoiser.modules() if type(module).__name__ in names]


def refuse_missing_package(base_precision: str) -> None:
    """Raise UserError if the form needs bitsandbytes, and that cannot be imported."""
    if base_precision == "auto":
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            "recipe: base_precision",
            f"{base_precision} needs the package bitsandbytes, which cannot be imported ({error})",
            "pip install -c constraints.txt -e '.[8bit]', or set it to auto",
        ) from error


def _try_out(base_precision: str, device: torch.device) -> None:
    """Raise UserError if weights cannot be held in this form on `device`."""
    refuse_missing_package(base_precision)
    reason = "it leaves weights there as they are"
    cause: RuntimeError | None = None
    try:
        tried = _quantise(torch.eye(64), base_precision, device)
        if is_quantised(tried):
            dequantised(tried, torch.float32)
            return
    except RuntimeError as error:
        reason, cause = (str(error).strip().splitlines() or [type(error).__name__])[0], error
    raise UserError(
        "recipe: base_precision",
        f"bitsandbytes has no {base_precision} on {device.type} ({reason})",
        "set it to auto, or see `python -m bitsandbytes`",
    ) from cause


class QuantisedLinear(nn.Linear):
    """A frozen linear layer with bitsandbytes' parameter for its weight.

    Not the library's own modules: its Linear8bitLt quantises activations too, on CUDA, and its
    Linear4bit rewrites its weight for some processors in a pass without gradients, after which it
    has none. What they share is the parameter, and the product.
    """

    def __init__(self, layer: nn.Linear, base_precision: str, device: torch.device) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = _quantise(layer.weight.detach(), base_precision, device)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return frozen_product(x.to(dtype), self.weight, bias)


def frozen_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W·x + bias, both in the type of `x`, with gradients for `x`.  # (..., in), (out, in)"""
    if not is_quantised(weight):
        return nn.functional.linear(
            x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        )
    output: Tensor = _FrozenProduct.apply(x, weight, bias)
    return output


class _FrozenProduct(torch.autograd.Function):
    """W·x + bias, which keeps the small form of W for the backward pass.  # (..., in)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.matmul(grad, computed(ctx.weight, grad.dtype)), None, None


def _quantise(weight: Tensor, base_precision: str, device: torch.device) -> nn.Parameter:
    import bitsandbytes

    if base_precision == "int8":
        int8: Any = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        return int8.to(device)
    nf4: Any = bitsandbytes.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True)
    return nf4.to(device)


# The functions below give a layer what it needs of its weight, in whatever form that is held.


def is_quantised(weight: Tensor) -> bool:
    # The attributes of bitsandbytes' parameters, which is imported only where there are some.
    return getattr(weight, "quant_state", getattr(weight, "SCB", None)) is not None


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W·x + bias in the type of `x`; for 4 bits bitsandbytes' product.  # (..., in), (out, in)"""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return nn.functional.linear(x, computed(weight, x.dtype), bias)
    import bitsandbytes

    found: Tensor = bitsandbytes.matmul_4bit(x, weight, state, bias=bias)
    return found


def computed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as matrix products take it; a quantised one is a copy, to be let go soon."""
    return dequantised(weight, dtype) if is_quantised(weight) else weight.to(dtype)


def dequantised(weight: Any, dtype: torch.dtype) -> Tensor:
    """The numbers that a quantised weight stands for.  # (out, in)"""
    if getattr(weight, "quant_state", None) is None:
        # The same formula as in bitsandbytes' MatMul8bitFp, which trains on processors.
        scales: Tensor = weight.SCB.unsqueeze(1) * (1 / INT8_LARGEST)
        return weight.data.to(dtype).mul_(scales)
    import bitsandbytes

    found: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return found.to(dtype)


def scale_bytes(weight: Any) -> int:
    """The bytes that a quantised weight has beside its numbers: its scales and their tables."""
    if getattr(weight, "quant_state", None) is None:
        return int(weight.SCB.nbytes)
    state = weight.quant_state
    nested = state.state2
    tensors = [state.absmax, state.code]
    if nested is not None:
        tensors += [state.offset, nested.absmax, nested.code]
    return sum(int(tensor.nbytes) for tensor in tensors)

"""What an update of one layer consists of: its parts, their shapes, its rank and scale.

A network and a frozen linear or convolution layer in, names and shapes out. The names and shapes
are PEFT's: a convolution is updated by one of its own kernel down to the rank and one of 1 × 1 up
again (Yeh et al. 2023, LyCORIS' LoCon). Flattened behind its first axis a kernel is a matrix, and
the update of a convolution is B·A as that of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from captioning import UserError
from training.recipe import Network

#: (module name, part) -> tensor
Parts = dict[tuple[str, str], Tensor]
Layer = nn.Linear | nn.Conv2d

# The beginning of text encoders' names. In a bank, a text encoder's layer is named by its encoder
# and its own name (`text_encoder.encoder.layers.0.mlp.fc1`), a denoiser's by its own name alone.
TEXT_ENCODER = "text_encoder"
DOWN, UP = "lora_A", "lora_B"
# The parts of one layer's update beside DOWN and UP, as they are called in checkpoints. PEFT knows
# the first; the other has a name of its own, so that no reader takes it for the other axis.
OUTPUT_MAGNITUDE, INPUT_MAGNITUDE = "lora_magnitude_vector", "lora_input_magnitude"
MAGNITUDES = {"output": OUTPUT_MAGNITUDE, "input": INPUT_MAGNITUDE}


def parts_of(network: Network) -> tuple[str, ...]:
    """The parts that an update of this network has."""
    magnitude = (MAGNITUDES[network.dora_axis],) if network.method == "dora" else ()
    return (DOWN, UP, *magnitude)


def weight_shape(layer: Layer) -> tuple[int, ...]:
    """The shape of the weight that the layer computes with; quantised ones are stored otherwise."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    # A shared weight is empty outside of its block's forward pass.
    return tuple(getattr(layer.weight, "ds_shape", layer.weight.shape))


def has_kernel(shape: Sequence[int]) -> bool:
    """Whether a weight (or DOWN) of this shape belongs to a convolution over more than one cell."""
    return any(side > 1 for side in shape[2:])


def is_of_encoder(name: str) -> bool:
    """Whether a bank's layer of this name belongs to a text encoder."""
    return name.startswith(TEXT_ENCODER)


def network_of(network: Network, name: str, shape: Sequence[int]) -> Network:
    """The network with the rank and alpha that it has on the layer `name` with such a weight."""
    if is_of_encoder(name):
        return network.of_encoders()
    return network.of_kernels() if has_kernel(shape) else network


def part_shape(part: str, rank: int, layer: Layer) -> tuple[int, ...]:
    """The shape of a part of an update of `rank` on `layer`, as PEFT stores it."""
    outputs, inputs, *kernel = weight_shape(layer)
    ones = [1] * len(kernel)
    if part in (DOWN, UP):
        return (rank, inputs, *kernel) if part == DOWN else (outputs, rank, *ones)
    length = outputs if part == OUTPUT_MAGNITUDE else inputs
    return (1, length, *ones) if kernel else (length,)


def flat_shape(part: str, rank: int, layer: Layer) -> tuple[int, ...]:
    """The same with a kernel as further columns.  # (r, in·k·k), (out, r), (out,) or (in,)"""
    outputs, inputs, *kernel = weight_shape(layer)
    columns = inputs * math.prod(kernel)
    return {
        DOWN: (rank, columns),
        UP: (outputs, rank),
        OUTPUT_MAGNITUDE: (outputs,),
        INPUT_MAGNITUDE: (inputs,),
    }[part]


def unpadded(tensor: Tensor, part: str, rank: int, layer: Layer) -> Tensor:
    """A view of a padded part in its flat shape, cut to its own rank and shaped as `part_shape`."""
    if part == DOWN:
        tensor = tensor[:rank]
    elif part == UP:
        tensor = tensor[:, :rank]
    return tensor.view(part_shape(part, rank, layer))


def axes_under(magnitude: str, layer: Layer) -> list[int]:
    """The axes of the layer's weight that a norm of `magnitude` is taken over."""
    return [
        axis for axis in range(len(weight_shape(layer))) if axis != (magnitude == INPUT_MAGNITUDE)
    ]


def refuse_unknown_kernels(name: str, layer: Layer) -> None:
    """UserError for a convolution of a form that `training.pack.conv` does not compute."""
    if isinstance(layer, nn.Linear):
        return
    plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    paddings = layer.padding
    if plain and not isinstance(paddings, str):
        sides = zip(paddings, layer.kernel_size, strict=True)
        if all(padding < side for padding, side in sides):
            return
    raise UserError(
        "recipe: network.targets",
        f"{name} is a convolution in groups, dilated or with another padding than zeros",
        "leave it out of the pattern",
    )

"""A library's optimiser over one row of the bank: made from a recipe's options, saved, restored.

A bank, a slot and options in; the optimiser and its state as named tensors out. No formula of an
optimiser is here. Most step over the whole row at once, which is the same and one kernel; those
that look at a tensor's shape or size get the parts, without the padding of their ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from captioning import UserError
from training.optimizer import Adafactor, AdamW, Optimizer, ScheduleFree
from training.pack.bank import AdapterBank

# Adafactor factors a matrix into rows and columns and clips a part by its own size; the 8-bit
# moments have a scale for each 256 numbers of a tensor, and small tensors keep 32 bits.
BY_PART = ("adafactor", "adamw8bit")
# Numbers that the library keeps once for all weights, beside the state of each weight.
SHARED_NUMBERS = {
    "prodigy": ("d", "d_max", "d_numerator", "k"),
    "schedulefree": ("k", "weight_sum", "lr_max"),
}
# Adafactor's second epsilon is for scaling by the weights, which is off here.
UNUSED_EPS = 1e-3

#: Parts of a layer's update: (module name, part)
Key = tuple[str, str]


class RowOptimizer:
    """Steps over row `index` of the bank by the gradients in `bank.grads`."""

    def __init__(self, bank: AdapterBank, index: int, options: Optimizer) -> None:
        """Raises UserError if the optimiser's package is not installed."""
        self._bank, self._index, self._options = bank, index, options
        self._keys: list[Key] = list(bank.split(index, bank.weights[index]))
        self._weights, self._grads = [bank.weights[index]], [bank.grads[index]]
        if options.type in BY_PART:
            self._weights = list(bank.split(index, bank.weights[index]).values())
            self._grads = list(bank.split(index, bank.grads[index]).values())
        self._parameters = [nn.Parameter(weight) for weight in self._weights]  # share the memory
        self._point()
        self.torch = _make(options, self._parameters)
        self._group = self.torch.param_groups[0]

    def averaged(self) -> Tensor | None:
        """The row of averaged weights, if the optimiser trains at other points than the average.

        # (P,)
        """
        if not isinstance(self._options, ScheduleFree) or not self._has_stepped():
            return None
        row: Tensor = self._bank.weights[self._index]
        trained = row.clone()
        self.torch.eval()  # type: ignore[attr-defined]
        averaged = row.clone()
        # Going back by `train` would round, so the weights from before are put back.
        row.copy_(trained)
        self._group["train_mode"] = True
        return averaged

    def stepped(self) -> None:
        """To be called after every step."""
        if self._options.type != "adamw8bit":
            return
        # The library moves a tensor that is not contiguous to memory of its own.
        for parameter, weight in zip(self._parameters, self._weights, strict=True):
            if parameter.data_ptr() != weight.data_ptr():
                weight.copy_(parameter.data)
        self._point()

    def _has_stepped(self) -> bool:
        return bool(self.torch.state.get(self._parameters[0]))

    def _point(self) -> None:
        both = zip(self._parameters, self._weights, self._grads, strict=True)
        for parameter, weight, grad in both:
            parameter.data, parameter.grad = weight, grad

    def state(self) -> dict[str, Tensor]:
        """All that the library keeps; empty before the first step.

        The names are `optimizer/<parameter>/<kind>` with PEFT's names of parameters, and
        `optimizer/<kind>` for what is counted once for all of them.
        """
        tensors: dict[str, Tensor] = {}
        if not self._has_stepped():
            return tensors
        for key, kind, value in self._state_of_parts():
            tensors[f"optimizer/{_name(key)}/{kind}"] = value
        for kind in SHARED_NUMBERS.get(self._options.type, ()):
            tensors[f"optimizer/{kind}"] = _number(self._group[kind])
        return tensors

    def _state_of_parts(self) -> Iterator[tuple[Key, str, Tensor]]:
        if self._options.type in BY_PART:
            for key, parameter in zip(self._keys, self._parameters, strict=True):
                for kind, value in self.torch.state[parameter].items():
                    yield key, kind, _number(value)
            return
        for kind, value in self.torch.state[self._parameters[0]].items():
            if isinstance(value, Tensor) and value.ndim:
                for key, part in self._bank.split(self._index, value).items():
                    yield key, kind, part
            else:
                for key in self._keys:
                    yield key, kind, _number(value)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` gave; from the beginning if there is nothing."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            parameter_name, _, kind = name.removeprefix("optimizer/").rpartition("/")
            if name.startswith("optimizer/"):
                by_name.setdefault(parameter_name, {})[kind] = tensor
        if not by_name:
            return
        found = {key: by_name[_name(key)] for key in self._keys}
        if self._options.type in BY_PART:
            for key, parameter in zip(self._keys, self._parameters, strict=True):
                self.torch.state[parameter] = {
                    kind: self._placed(value) for kind, value in found[key].items()
                }
        else:
            self.torch.state[self._parameters[0]] = {
                kind: self._bank.join(self._index, {key: found[key][kind] for key in self._keys})
                if value.ndim
                else self._placed(value)
                for kind, value in found[self._keys[0]].items()
            }
        for kind in SHARED_NUMBERS.get(self._options.type, ()):
            self._group[kind] = tensors[f"optimizer/{kind}"].item()

    def _placed(self, value: Tensor) -> Any:
        """A copy on the bank's device; a plain integer where the library counts in such ones."""
        if value.dtype == torch.int64:
            return int(value)
        return value.to(self._bank.device, copy=True)


def library_class(options: Optimizer) -> Any:
    """The library's class that takes the steps.

    Raises UserError if its package cannot be imported.
    """
    module, _, name = options.library.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            "recipe: optimizer.type",
            f"{options.type} needs the package {package}, which cannot be imported ({error})",
            "pip install -c constraints.txt -e '.[8bit]', or choose another optimizer.type",
        ) from error


def _make(options: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    settings = options.model_dump(exclude={"type", "lora_plus_ratio", "weight_decay"})
    if isinstance(options, AdamW):
        settings["fused"] = True
    if isinstance(options, Adafactor):
        settings["eps"] = (options.eps, UNUSED_EPS)
        settings |= {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    optimizer: torch.optim.Optimizer = library_class(options)(parameters, **settings)
    # It is set afterwards, since prodigyopt prints a line when it is given one.
    optimizer.param_groups[0]["weight_decay"] = options.weight_decay
    if isinstance(options, ScheduleFree):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _number(value: Any) -> Tensor:
    """A number as a tensor: a float in double precision, an integer as an integer."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _name(key: Key) -> str:
    module, part = key
    return f"{module}.{part}.default.weight"

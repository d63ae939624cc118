"""Adapters on a base's text encoders: which layers have one, and how it is put on and taken off.

A base and a network in, layers by the names that they have in a bank out. The weights of an encoder
are never touched.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from training.families import Base
from training.pack.bank import AdapterBank, install, uninstall
from training.pack.layer import BankLayer
from training.pack.parts import Layer, is_of_encoder
from training.recipe import Network


def encoder_layers(base: Base, network: Network) -> dict[str, Layer]:
    """The layers of the text encoders that get an update; none where the network trains none.

    They are the attentions' projections, as in diffusers' scripts, and with the preset's
    feed-forward layers also those, as in kohya's. A layer on which no output depends is left out,
    since it could learn nothing.
    """
    if network.text_encoder is None:
        return {}
    endings = base.encoder_attention_modules
    if network.has_feed_forward:
        endings += base.encoder_feed_forward_modules
    layers = {}
    for component, encoder in base.text_encoders.items():
        for name, module in encoder.named_modules():
            inner = module.base_layer if isinstance(module, BankLayer) else module
            wanted = isinstance(inner, nn.Linear) and name.endswith(endings)
            if wanted and base.is_read(component, name):
                layers[f"{component}.{name}"] = inner
    return layers


def install_on_encoders(base: Base, layers: Mapping[str, Layer], bank: AdapterBank) -> None:
    """Put the bank on those of its `layers` that belong to text encoders."""
    first = sum(not is_of_encoder(name) for name in layers)
    for component, encoder in base.text_encoders.items() if first < len(layers) else ():
        prefix = f"{component}."
        own = {
            name.removeprefix(prefix): layer
            for name, layer in layers.items()
            if name.startswith(prefix)
        }
        install(encoder, own, bank, first)
        first += len(own)
        base.text_is_adapted = True


def uninstall_from_encoders(base: Base) -> None:
    """Take the bank off the text encoders that are loaded."""
    for encoder in base.loaded_text_encoders.values():
        uninstall(encoder)
    base.text_is_adapted = False

"""An ONNX file made half as large: weights stored as fp16, widened again when it is loaded."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

# Smaller tensors (shapes, scales) are not worth a node of their own.
SMALLEST_ELEMENTS = 64


def store_as_half(path: Path) -> None:
    """Rewrite the file at `path`; the network computes in fp32 as before."""
    onnx.save(halved(onnx.load(path)), path)


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with its weights stored as fp16 and widened when it is loaded."""
    casts = []
    for weight in model.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if weight.data_type != TensorProto.FLOAT or values.size < SMALLEST_ELEMENTS:
            continue
        name = weight.name
        half = values.astype("float16")
        weight.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}_fp16"))
        casts.append(helper.make_node("Cast", [weight.name], [name], to=TensorProto.FLOAT))
    for place, cast in enumerate(casts):
        model.graph.node.insert(place, cast)
    names = {cast.output[0] for cast in casts}
    kept = [info for info in model.graph.value_info if info.name not in names]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    onnx.checker.check_model(model)
    return model

"""Writes a WD-style tagger of a few bytes, so that tests know every score beforehand.

The ONNX file is encoded by hand (it is one small protobuf message): the package `onnx` is needed
only to build the starter models, not to test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FLOAT, INT64 = 1, 7  # onnx.TensorProto.DataType
INT, INTS = 2, 7  # onnx.AttributeProto.AttributeType
# Tag, category and weights of (blue, green, red) means: a score is sigmoid((mean - 128) / 16).
TAGS = (
    ("general", 9, (0, 0, 0)),
    ("blue_sky", 0, (1, 0, 0)),
    ("green_grass", 0, (0, 1, 0)),
    ("red_hair", 4, (0, 0, 1)),
    ("^_^", 0, (0, 0, 1)),
)


def write_tagger(
    folder: Path, size_px: int = 16, batch: int | None = None, fails_on_white: bool = False
) -> Path:
    """A tagger that looks at the mean colour only; see TAGS."""
    weights = np.array([tag[2] for tag in TAGS], np.float32).T / 16  # (3, tags)
    bias = np.array([-8.0 if any(tag[2]) else 3.0 for tag in TAGS], np.float32)
    nodes = [_node("ReduceMean", ["x"], "mean", axes=[1, 2], keepdims=0)]
    constants = [_tensor("w", weights), _tensor("b", bias)]
    means = "mean"
    if fails_on_white:
        # White (mean 255) asks for item 1 of a list of one: onnxruntime raises at run time.
        constants += [
            _tensor("scale", np.array(1 / 250, np.float32)),
            _tensor("one", np.zeros(1, np.float32)),
        ]
        nodes += [
            _node("Mul", ["mean", "scale"], "scaled"),
            _node("Cast", ["scaled"], "index", to=INT64),
            _node("Gather", ["one", "index"], "zeros"),
            _node("Add", ["mean", "zeros"], "checked"),
        ]
        means = "checked"
    nodes += [
        _node("MatMul", [means, "w"], "product"),
        _node("Add", ["product", "b"], "logits"),
        _node("Sigmoid", ["logits"], "y"),
    ]
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, b"tiny")
    graph += b"".join(_field(5, constant) for constant in constants)
    graph += _field(11, _value("x", (batch, size_px, size_px, 3)))
    graph += _field(12, _value("y", (batch, len(TAGS))))
    opset = _field(8, _field(1, b"") + _number(2, 13))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(_number(1, 8) + opset + _field(7, graph))
    rows = [f"{row},{name},{category},1" for row, (name, category, _) in enumerate(TAGS)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]))
    return folder


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _node(op: str, inputs: list[str], output: str, **attributes: int | list[int]) -> bytes:
    node = b"".join(_field(1, name.encode()) for name in inputs)
    node += _field(2, output.encode()) + _field(4, op.encode())
    for name, value in attributes.items():
        if isinstance(value, int):
            body = _number(3, value) + _number(20, INT)
        else:
            body = b"".join(_number(8, item) for item in value) + _number(20, INTS)
        node += _field(5, _field(1, name.encode()) + body)
    return node


def _tensor(name: str, array: np.ndarray) -> bytes:
    dims = b"".join(_number(1, side) for side in array.shape)
    return dims + _number(2, FLOAT) + _field(8, name.encode()) + _field(9, array.tobytes())


def _value(name: str, shape: tuple[int | None, ...]) -> bytes:
    dims = b"".join(
        _field(1, _field(2, b"N") if side is None else _number(1, side)) for side in shape
    )
    tensor = _number(1, FLOAT) + _field(2, dims)
    return _field(1, name.encode()) + _field(2, _field(1, tensor))

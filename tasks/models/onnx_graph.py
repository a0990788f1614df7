"""What an ONNX file holds, read without its weights' data: operators, initializers, and what its linear layers are."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INTEGER, PACKED = "MatMulInteger", "MatMulNBits"
_PLAIN = ("MatMul", "Gemm")
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "uint8": 8, "int4": 4, "uint4": 4}  # of weights


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A product with a weight of shape (inputs, outputs).

    `bytes` holds its scales and zero points too; `head` makes logits; `group` is how many weights of a packed one share
    a scale, 0 for others.
    """

    operator: str
    dtype: str
    inputs: int
    outputs: int
    bytes: float
    head: bool = False
    group: int = 0


@dataclass(frozen=True, kw_only=True)
class Graph:
    """`elements` and `bytes` of all initializers that can be weights: of floating-point or small integer types.

    `embedding_bytes` are those of a table of which rows are gathered and that nothing else uses.
    """

    operators: Counter[str]
    elements: dict[str, int]
    bytes: float
    linears: tuple[Linear, ...] = field(default=())
    embedding_bytes: float = 0.0
    opset: int = 0


def read_graph(path: Path) -> Graph:
    """The graph in `path`; weights that lie in a file beside it are described by it and not read."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    elements: Counter[str] = Counter()
    for tensor in held.values():
        elements[_dtype(tensor)] += math.prod(tensor.dims)
    elements = Counter({dtype: count for dtype, count in elements.items() if dtype in _BITS})
    head = head_of(model.graph)
    return Graph(
        operators=Counter(node.op_type for node in model.graph.node),
        elements=dict(elements),
        bytes=sum(count * _BITS[dtype] / 8 for dtype, count in elements.items()),
        linears=tuple(found for node in model.graph.node if (found := _linear(node, model.graph, held, head))),
        embedding_bytes=_embedding_bytes(model.graph, held),
        opset=max(item.version for item in model.opset_import if item.domain in ("", "ai.onnx")),
    )


def head_of(graph: Any) -> str | None:
    """Name of the product whose result is the logits, perhaps after a bias or another shape."""
    makers = {output: node for node in graph.node for output in node.output}
    wanted = "logits"
    while wanted in makers:
        node = makers[wanted]
        if node.op_type in (*_PLAIN, INTEGER, PACKED):
            return str(node.name)
        if node.op_type not in ("Add", "Reshape", "Mul", "Cast", "Squeeze"):
            return None
        wanted = next((name for name in node.input if name in makers), "")
    return None


def _linear(node: Any, graph: Any, held: dict[str, Any], head: str | None) -> Linear | None:
    if node.op_type not in (*_PLAIN, INTEGER, PACKED):
        return None
    weight = held.get(node.input[1])
    turned = _attribute(node, "transB", 0) == 1
    if weight is None:  # a tied head is the embedding, turned when it is used
        turn = next((n for n in graph.node if node.input[1] in n.output and n.op_type == "Transpose"), None)
        weight, turned = held.get(turn.input[0]) if turn is not None else None, True
    if weight is None:
        return None
    parts = [weight, *(held[name] for name in node.input[2:4] if name in held and node.op_type == PACKED)]
    if node.op_type == INTEGER:
        names = (weight.name.removesuffix("_quantized") + end for end in ("_scale", "_zero_point"))
        parts += [held[name] for name in names if name in held]
    if node.op_type == PACKED:
        rows, columns, group = (_attribute(node, name, 0) for name in ("K", "N", "block_size"))
        dtype = f"int{_attribute(node, 'bits', 4)}"
    else:
        (rows, columns), group = reversed(weight.dims) if turned else weight.dims, 0
        dtype = _dtype(weight)
    return Linear(
        operator=node.op_type, dtype=dtype, inputs=int(rows), outputs=int(columns), group=int(group),
        bytes=sum(math.prod(part.dims) * _BITS.get(_dtype(part), 64) / 8 for part in parts), head=node.name == head,
    )  # fmt: skip


def _embedding_bytes(graph: Any, held: dict[str, Any]) -> float:
    users: Counter[str] = Counter(name for node in graph.node for name in node.input)
    gathered = {node.input[0] for node in graph.node if node.op_type == "Gather" and users[node.input[0]] == 1}
    tables = [held[name] for name in gathered if name in held and len(held[name].dims) == 2]
    return float(sum(math.prod(table.dims) * _BITS.get(_dtype(table), 0) / 8 for table in tables))


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)


def _dtype(tensor: Any) -> str:
    """Its name as torch and numpy have it."""
    import onnx

    name = str(onnx.TensorProto.DataType.Name(tensor.data_type)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)

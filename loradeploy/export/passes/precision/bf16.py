"""Store weights in bfloat16 and compute in float32.

    W [float32]     →     W [bfloat16] → Cast → [float32]

The file is half as large, and exact for a checkpoint that was published in bfloat16. onnxruntime
(1.31) has no product of bfloat16 matrices on the CPU and folds the casts when it loads a graph: in
memory the weights are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from loradeploy.export.graph.edit import source_of

if TYPE_CHECKING:
    import onnx_ir as ir

# The operators that use weights, and the index of that input. A product's first input is data, or a
# table that has to be exact, such as a rotary embedding's.
_USES: Final = (("MatMul", 1), ("Gemm", 1), ("Gather", 0), ("Conv", 1))
_CARRIERS: Final = ("Identity", "Transpose")


def store_as_bfloat16(graph: ir.Graph) -> None:
    """Store float32 weights of two or more dimensions in bfloat16, and cast them for their uses."""
    import onnx_ir as ir

    to_float = {"to": int(ir.DataType.FLOAT)}
    for value in list(dict.fromkeys(_weights(graph))):
        cast = ir.node("Cast", [value], attributes=to_float, name=f"{value.name}/float32")
        used = cast.outputs[0]
        used.name, used.dtype, used.shape = cast.name, ir.DataType.FLOAT, value.shape
        value.replace_all_uses_with(used)
        cast.replace_input_with(0, value)
        graph.insert_before(graph[0], cast)
        _cast_weight(value, ir.DataType.BFLOAT16)


def has_float32_weights(graph: ir.Graph) -> bool:
    """Whether `store_as_bfloat16` would round a weight."""
    return next(_weights(graph), None) is not None


def compute_as_float32(graph: ir.Graph) -> None:
    """Undo `store_as_bfloat16`: store the rounded weights in float32."""
    import onnx_ir as ir

    for value in list(graph.initializers.values()):
        users = [node for node, _ in value.uses()]
        if value.dtype != ir.DataType.BFLOAT16 or not users or not all(map(_to_float, users)):
            continue
        for cast in users:
            cast.outputs[0].replace_all_uses_with(value)
        graph.remove(users, safe=True)
        _cast_weight(value, ir.DataType.FLOAT)


def _cast_weight(value: ir.Value, dtype: ir.DataType) -> None:
    """Change an initializer's dtype; its values are cast when they are read."""
    import onnx_ir as ir

    tensor = value.const_value
    assert tensor is not None
    value.dtype = dtype
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(dtype.numpy())),
        dtype=dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=value.name,
    )


def _weights(graph: ir.Graph) -> Iterator[ir.Value]:
    import onnx_ir as ir

    for node in ir.traversal.RecursiveGraphIterator(graph):
        for op, index in _USES:
            if node.op_type == op and node.domain == "":
                value = source_of(node.inputs[index], _CARRIERS)
                if value is not None and _is_weight(value):
                    yield value


def _is_weight(value: ir.Value) -> bool:
    import onnx_ir as ir

    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
        return False
    return value.is_initializer() and not (value.is_graph_input() or value.is_graph_output())


def _to_float(node: ir.Node) -> bool:
    import onnx_ir as ir

    return node.op_type == "Cast" and node.attributes["to"].as_int() == int(ir.DataType.FLOAT)

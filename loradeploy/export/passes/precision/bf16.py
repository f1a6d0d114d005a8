"""Weights stored as bfloat16, computed with as float32.

    W [float32]     →     W [bfloat16] → Cast → [float32]

The file is half as large. Of a checkpoint that was published in bfloat16 it holds every number as
it is. onnxruntime (1.31) has no product of bfloat16 matrices on the CPU and folds the casts when it
loads a graph: weights take the memory of float32 then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from loradeploy.export.graph.edit import source_of

if TYPE_CHECKING:
    import onnx_ir as ir

# Where weights are used: operators and the index of their input. A product's first input is data,
# or a table of its own, such as a rotary embedding's, which has to be exact.
_USES: Final = (("MatMul", 1), ("Gemm", 1), ("Gather", 0), ("Conv", 1))
_CARRIERS: Final = ("Identity", "Transpose")


def store_as_bfloat16(graph: ir.Graph) -> None:
    """Hold every float32 weight of two dimensions and more as bfloat16, cast where it is used."""
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
    """Undo `store_as_bfloat16`: the weights are float32 again, as they were rounded."""
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
    """Let an initializer be of `dtype`; its numbers are cast when they are read."""
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

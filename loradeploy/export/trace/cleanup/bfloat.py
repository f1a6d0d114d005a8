"""Compute bfloat16 arithmetic inside a float32 model in float32, and round the result.

Falcon's ALiBi is computed in bfloat16 whatever the model's dtype is. onnxruntime (1.31) has no such
operators on the CPU. Computing the result of two bfloat16 numbers in float32 and rounding it once
is equivalent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import onnx_ir as ir

_ARITHMETIC: Final = frozenset({"Add", "Div", "Mul", "Sub"})


def compute_bfloat16_in_float32(graph: ir.Graph) -> None:
    """x ∘ y [bfloat16] → Cast(Cast(x) ∘ Cast(y))."""
    import onnx_ir as ir

    for node in list(graph):
        y = node.outputs[0]
        if node.op_type not in _ARITHMETIC or node.domain or y.dtype != ir.DataType.BFLOAT16:
            continue
        for index, value in enumerate(list(node.inputs)):
            widened = ir.node(
                "Cast",
                [value],
                attributes={"to": int(ir.DataType.FLOAT)},
                name=f"{node.name}/float32_{index}",
            )
            widened.outputs[0].name = widened.name
            widened.outputs[0].dtype = ir.DataType.FLOAT
            if value is not None:
                widened.outputs[0].shape = value.shape
            graph.insert_before(node, widened)
            node.replace_input_with(index, widened.outputs[0])
        rounded = ir.node(
            "Cast",
            [y],
            attributes={"to": int(ir.DataType.BFLOAT16)},
            name=f"{node.name}/bfloat16",
        )
        made = rounded.outputs[0]
        made.name, made.dtype, made.shape = rounded.name, ir.DataType.BFLOAT16, y.shape
        y.dtype = ir.DataType.FLOAT
        y.replace_all_uses_with(made)
        rounded.replace_input_with(0, y)
        graph.insert_after(node, rounded)

"""Graphs with an input that says of how many last tokens logits are given: those of all are.

    num_logits_to_keep [] = 0        hidden[:, -0:] are all of them

transformers gives 0 that meaning, and graphs for transformers.js have such an input. A bundle has
an input of its own for the tokens whose logits are wanted. In transformers a tensor of that name
can be a list of positions as well, of which [0] would be the first token alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import free_name

if TYPE_CHECKING:
    import onnx_ir as ir

_NAMES: Final = ("num_logits_to_keep", "logits_to_keep")
# 0 stays 0 on the way through these.
_CARRIERS: Final = ("Cast", "Identity", "Neg", "Reshape", "Squeeze", "Unsqueeze")
_STARTS: Final = 1  # of the inputs of a Slice


def keep_all_logits(graph: ir.Graph) -> None:
    """Let such an input be the constant 0.

    Raises:
        ExportError: the graph does something else with it than to cut the last tokens off.
    """
    import onnx_ir as ir

    for value in list(graph.inputs):
        if value.name not in _NAMES or value.is_initializer() or value.dtype is None:
            continue
        if not value.dtype.is_integer() or value.shape is None or len(value.shape) > 1:
            continue
        if not _is_start(value):
            raise ExportError(
                f"the graph's input {value.name} is not how many last tokens get logits: export the"
                " graph without it, with the logits of all tokens"
            )
        shape = () if len(value.shape) == 0 else (1,)
        graph.inputs.remove(value)
        value.name = free_name(graph, f"{value.name}.all")  # a bundle has an input of that name
        value.shape = ir.Shape(shape)
        value.const_value = ir.tensor(np.zeros(shape, value.dtype.numpy()), name=value.name)
        graph.register_initializer(value)


def _is_start(value: ir.Value) -> bool:
    """Whether `value` is where slices begin, and nothing else."""
    if value.is_graph_output():
        return False
    for node, index in value.uses():
        if node.domain != "":
            return False
        carried = node.op_type in _CARRIERS and index == 0
        if carried and not _is_start(node.outputs[0]):
            return False
        if not carried and (node.op_type, index) != ("Slice", _STARTS):
            return False
    return True

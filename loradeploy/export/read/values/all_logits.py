"""Fix an input for the number of last tokens with logits, so that all tokens have logits.

    num_logits_to_keep [] = 0        hidden[:, -0:] is all of hidden

transformers gives 0 this meaning, and graphs for transformers.js have such an input. A bundle has
another input for the tokens with logits. In transformers, a tensor of that name can also be a list
of positions, where [0] would be the first token only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import free_name

if TYPE_CHECKING:
    import onnx_ir as ir

_NAMES: Final = ("num_logits_to_keep", "logits_to_keep")
# Operators that keep 0 as it is.
_CARRIERS: Final = ("Cast", "Identity", "Neg", "Reshape", "Squeeze", "Unsqueeze")
_STARTS: Final = 1  # the index of the starts of a Slice


def keep_all_logits(graph: ir.Graph) -> None:
    """Replace such an input by the constant 0.

    Raises:
        ExportError: the graph does not only use it to slice the last tokens.
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
    """Whether `value` is used only as the start of slices."""
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

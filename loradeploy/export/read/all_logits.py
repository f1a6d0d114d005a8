"""Graphs with an input that says of how many last tokens logits are given: those of all are.

    num_logits_to_keep [] = 0        hidden[:, -0:] are all of them

transformers gives 0 that meaning, and graphs for transformers.js have such an input. A bundle has
an input of its own for the tokens whose logits are wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.export.graph.edit import free_name

if TYPE_CHECKING:
    import onnx_ir as ir

_NAMES: Final = ("num_logits_to_keep", "logits_to_keep")


def keep_all_logits(graph: ir.Graph) -> None:
    """Let such an input be the constant 0."""
    import onnx_ir as ir

    for value in list(graph.inputs):
        if value.name not in _NAMES or value.is_initializer() or value.dtype is None:
            continue
        if not value.dtype.is_integer() or value.shape is None or len(value.shape) > 1:
            continue
        shape = () if len(value.shape) == 0 else (1,)
        graph.inputs.remove(value)
        value.name = free_name(graph, f"{value.name}.all")  # a bundle has an input of that name
        value.shape = ir.Shape(shape)
        value.const_value = ir.tensor(np.zeros(shape, value.dtype.numpy()), name=value.name)
        graph.register_initializer(value)

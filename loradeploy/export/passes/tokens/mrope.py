"""Add an input for positions in three dimensions, which decoders use for an image's patches.

    rotary(Unsqueeze(position_ids))    becomes    rotary(Where(mrope < 0, Unsqueeze(…), mrope))

    mrope_position_ids  [3, 1, 1] of -1       the default: `position_ids` in all three
                        [3, batch, sequence]  time, row and column of each token

Qwen2-VL: https://arxiv.org/abs/2409.12191, section 2.1, "Multimodal Rotary Position Embedding".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.manifest import TensorSpec, default_of
from loradeploy.bundle.names import MROPE_POSITION_IDS, POSITION_IDS
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    Chain,
    add_constant,
    add_optional_input,
    graph_input,
    replace_uses,
)
from loradeploy.export.graph.names import step_name

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

AXES: Final = 3  # time, row, column
_RANK: Final = 3
_CARRIERS: Final = ("Unsqueeze", "Expand", "Slice")  # of position_ids to its three axes


def add_mrope_positions(model: ir.Model) -> TensorSpec:
    """Add the optional input `mrope_position_ids` to a decoder's graph.

    Raises:
        ExportError: the graph does not use positions once, as a tensor [1 or 3, batch, sequence].
    """
    import onnx_ir as ir

    graph = model.graph
    plain = _axes_of(graph)
    last = None if plain is None else plain.producer()
    if plain is None or last is None:
        raise ExportError(
            f"the graph does not read {POSITION_IDS} in one place, where positions in three"
            " dimensions could be read instead"
        )
    spec = TensorSpec(MROPE_POSITION_IDS, "int64", (AXES, "mrope_rows", "mrope"))
    given = add_optional_input(graph, spec.name, default_of(spec), spec.shape)
    zero = add_constant(graph, step_name(MROPE_POSITION_IDS, "zero"), np.array(0, np.int64))
    chain = Chain(graph, last, MROPE_POSITION_IDS, ir.DataType.BOOL)
    none = chain.add("Less", "none", [given, zero])
    values = Chain(graph, chain.last, MROPE_POSITION_IDS, ir.DataType.INT64)
    result = values.add("Where", "read", [none, plain, given])
    replace_uses(plain, result, keep=[values.last])
    result.shape = None if plain.shape is None else ir.Shape([AXES, *plain.shape[1:]])
    return spec


def _axes_of(graph: ir.Graph) -> ir.Value | None:
    """`position_ids` in the form that the rotary embedding uses, [1 or 3, batch, sequence]."""
    value = graph_input(graph, POSITION_IDS)
    found = None
    while value is not None:
        users = [node for node, _ in value.uses() if node.op_type != "Shape"]
        if len(users) != 1 or users[0].op_type not in _CARRIERS:
            break
        value = users[0].outputs[0]
        if value.shape is None or len(value.shape) != _RANK:
            break
        found = value if value.shape[0] in (1, AXES) else found
    return found


def sample_positions(ids: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
    """Random positions in three dimensions for `ids` [batch, sequence], for a trial."""
    random = np.random.default_rng(1)
    return {MROPE_POSITION_IDS: random.integers(0, 8, (AXES, *ids.shape))}

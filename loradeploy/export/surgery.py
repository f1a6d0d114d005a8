"""What side inputs of every kind share: the graph under the knife, and the rows of its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.names import ADAPTER_IDS
from loradeploy.errors import ExportError
from loradeploy.export.rewire import Chain, add_constant

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


class Surgery:
    """The graph under the knife, its `adapter_ids`, and the defaults of what was replaced."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self.graph = graph
        self.dtype = dtype
        self.defaults: dict[str, NDArray[Any]] = {}
        self.ids = self.side_input(ADAPTER_IDS, ["rows"], np.zeros(1, np.int64))
        self._sequence_axis: ir.Value | None = None

    @property
    def sequence_axis(self) -> ir.Value:
        """The constant [1]: where a sequence axis is put in and taken out."""
        if self._sequence_axis is None:
            axis = np.array([1], np.int64)
            self._sequence_axis = add_constant(self.graph, "side_inputs.sequence_axis", axis)
        return self._sequence_axis

    def side_input(self, name: str, shape: list[int | str], default: NDArray[Any]) -> ir.Value:
        """A graph input of `shape` that is `default` where nothing is fed."""
        if name in self.graph.initializers or any(v.name == name for v in self.graph.inputs):
            raise ExportError(f"the graph already has a value named {name}")
        value = add_constant(self.graph, name, default, shape=shape)
        self.graph.inputs.append(value)
        return value

    def chain(self, node: ir.Node, label: str) -> Chain:
        """New nodes behind `node`."""
        return Chain(self.graph, node, label, self.dtype)


def input_of(node: ir.Node, label: str) -> tuple[ir.Value, bool]:
    """A product's x, and whether it is [batch, in] instead of [batch, sequence, in].

    Raises:
        ExportError: it is neither, or the graph does not tell.
    """
    x, y = node.inputs[0], node.outputs[0]
    shape = x.shape if x is not None and x.shape is not None else y.shape
    if x is None or shape is None:
        raise ExportError(f"the graph does not tell the shape of {label}'s input")
    if len(shape) not in (2, 3):
        raise ExportError(
            f"{label} takes an input of rank {len(shape)}, whose rows cannot have adapters of their"
            " own: merge the adapter instead"
        )
    return x, len(shape) == 2

"""What side inputs of every kind share: the graph under the knife, and the rows of its inputs."""

from __future__ import annotations

from dataclasses import dataclass
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
        self._constants: dict[str, ir.Value] = {}

    @property
    def sequence_axis(self) -> ir.Value:
        """The constant [1]: where a sequence axis is put in and taken out."""
        return self.integers("sequence_axis", [1])

    def integers(self, name: str, numbers: list[int]) -> ir.Value:
        """A constant of the surgery's own, made once."""
        if name not in self._constants:
            self._constants[name] = add_constant(
                self.graph, f"side_inputs.{name}", np.array(numbers, np.int64)
            )
        return self._constants[name]

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


@dataclass(frozen=True, eq=False)
class Rows:
    """Where a product's rows are, so that each row of a batch can have its own adapter.

    `x`: [batch, sequence, in], or [batch, in] where there is `no_sequence`. `flattened`: the
    product itself takes x as [batch · sequence, in], and gives y so.
    """

    x: ir.Value
    no_sequence: bool = False
    flattened: bool = False


def rows_of(node: ir.Node, label: str) -> Rows:
    """The rows of the product `node`.

    Raises:
        ExportError: its input is of another rank, or the graph does not tell.
    """
    x, y = node.inputs[0], node.outputs[0]
    shape = x.shape if x is not None and x.shape is not None else y.shape
    if x is None or shape is None:
        raise ExportError(f"the graph does not tell the shape of {label}'s input")
    if len(shape) == 3:
        return Rows(x)
    if len(shape) != 2:
        raise ExportError(
            f"{label} takes an input of rank {len(shape)}, whose rows cannot have adapters of their"
            " own: merge the adapter instead"
        )
    reshape = x.producer()
    if reshape is not None and reshape.op_type == "Reshape":
        whole = reshape.inputs[0]
        if whole is not None and whole.shape is not None and len(whole.shape) == 3:
            return Rows(whole, flattened=True)
        raise ExportError(
            f"{label} takes a reshaped input, and the graph does not tell from what: run ONNX shape"
            " inference on it first, or merge the adapter instead"
        )
    return Rows(x, no_sequence=True)

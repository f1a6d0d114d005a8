"""The state of graph surgery that all kinds of side inputs share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.names import ADAPTER_IDS, lora_a_name, lora_b_name
from loradeploy.export.graph.edit import Chain, add_constant, add_optional_input

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


class Surgery:
    """The graph that is changed, its `adapter_ids`, and the defaults of replaced parameters."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self.graph = graph
        self.dtype = dtype
        self.defaults: dict[str, NDArray[Any]] = {}
        self.ids = self.side_input(ADAPTER_IDS, ["rows"], np.zeros(1, np.int64))
        self._constants: dict[str, ir.Value] = {}
        self._unflattened: dict[int, ir.Value] = {}
        self._sizes: Chain | None = None

    @property
    def sequence_axis(self) -> ir.Value:
        """The constant [1]: the index at which a sequence axis is inserted and removed."""
        return self.integers("sequence_axis", [1])

    def integers(self, name: str, numbers: list[int]) -> ir.Value:
        """An int64 constant of the surgery, added once."""
        if name not in self._constants:
            self._constants[name] = add_constant(
                self.graph, f"side_inputs.{name}", np.array(numbers, np.int64)
            )
        return self._constants[name]

    def unflattened(self, features: int) -> ir.Value:
        """The shape [batch, -1, features], with the batch size of the graph's first input."""
        import onnx_ir as ir

        if self._sizes is None:
            source = first_input(self.graph)
            shape = ir.node("Shape", [source], name="side_inputs/shape")
            shape.outputs[0].name = shape.name
            self.graph.insert_before(self.graph[0], shape)
            self._sizes = Chain(self.graph, shape, "side_inputs", ir.DataType.INT64)
            first = self.integers("first", [0])
            self._sizes.add("Gather", "batch", [shape.outputs[0], first], axis=0)
            self._batch = self._sizes.last.outputs[0]
        if features not in self._unflattened:
            rest = self.integers(f"rest_{features}", [-1, features])
            self._unflattened[features] = self._sizes.add(
                "Concat", f"unflattened_{features}", [self._batch, rest], axis=0
            )
        return self._unflattened[features]

    def side_input(self, name: str, shape: list[int | str], default: NDArray[Any]) -> ir.Value:
        """See `add_optional_input`."""
        return add_optional_input(self.graph, name, default, shape)

    def factors(self, module: str, into: int, out: int) -> tuple[ir.Value, ir.Value]:
        """`M.lora_A` [adapters, in, rank] and `M.lora_B` [adapters, rank, out], of rank 0."""
        dtype = self.dtype.numpy()
        # A separate symbol: for ONNX Runtime equal symbols are equal sizes, but ranks may differ.
        rank = f"{module}.rank"
        A = self.side_input(
            lora_a_name(module), ["adapters", into, rank], np.zeros((1, into, 0), dtype)
        )
        B = self.side_input(
            lora_b_name(module), ["adapters", rank, out], np.zeros((1, 0, out), dtype)
        )
        return A, B

    def chain(self, node: ir.Node, label: str, dtype: ir.DataType | None = None) -> Chain:
        """New nodes after `node`, by default with the dtype of the side inputs."""
        return Chain(self.graph, node, label, self.dtype if dtype is None else dtype)


def first_input(graph: ir.Graph) -> ir.Value | None:
    """The first input that has no default: its first dimension is the batch."""
    return next((value for value in graph.inputs if not value.is_initializer()), None)

"""Find the rows of the batch in a product's input, each of which can have another adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loradeploy.errors import ExportError
from loradeploy.export.match.observe import FLATTENED, FRONT, SECOND, Seen, not_run, seen_at
from loradeploy.export.match.products import OPERATORS as PRODUCTS
from loradeploy.export.match.products import input_of, output_of, repeated_for_rows
from loradeploy.export.passes.side_inputs.surgery import first_input

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.export.graph.edit import Chain
    from loradeploy.export.passes.side_inputs.surgery import Surgery

# Operators that compute each row of their result from the same row of their (first) input.
_ROW_BY_ROW: Final = (
    *("Add", "Cast", "Clip", "Div", "Dropout", "Elu", "Erf", "Gelu", "Identity"),
    *("LayerNormalization", "Mul", "RMSNormalization", "Relu", "Sigmoid"),
    *("SimplifiedLayerNormalization", "SkipLayerNormalization", "Softplus", "Sub", "Tanh"),
    *PRODUCTS,
)

_SHOWN: Final = 120  # characters of onnxruntime's message in an error


@dataclass(frozen=True, eq=False)
class Rows:
    """The layout of a product's input, in which each row of the batch can have another adapter.

    `x`: [batch, sequence, in]; [batch, in] if `no_sequence`; [sequence, batch, in] if
    `sequence_first`; if `flattened`, [batch · sequence, in], or a value of more axes with
    consecutive blocks for the rows of the batch. `rank`: its number of axes. `repeated`: whether it
    is [1, sequence, in], and the output is repeated for each row.
    """

    x: ir.Value
    no_sequence: bool = False
    flattened: bool = False
    sequence_first: bool = False
    rank: int = 3
    repeated: bool = False

    @property
    def moved(self) -> bool:
        """Whether the rows have to be moved to the front, and back."""
        return self.flattened or self.sequence_first

    def front(self, surgery: Surgery, chain: Chain, x: ir.Value, size: int, name: str) -> ir.Value:
        """`x`, in the layout of the product's input or output, as [batch, sequence, `size`]."""
        if self.flattened:
            return chain.add("Reshape", name, [x, surgery.unflattened(size)])
        if self.sequence_first:
            return chain.add("Transpose", name, [x], perm=[1, 0, 2])
        return x

    def back(
        self, surgery: Surgery, chain: Chain, x: ir.Value, like: ir.Value, size: int, name: str
    ) -> ir.Value:
        """`x` [batch, sequence, `size`] in the layout of `like`, a value of the product."""
        if self.flattened and self.rank == 2:
            return chain.add("Reshape", name, [x, surgery.integers(f"flat_{size}", [-1, size])])
        if self.flattened:
            return chain.add("Reshape", name, [x, chain.shape(f"{name}_shape", like)])
        if self.sequence_first:
            return chain.add("Transpose", name, [x], perm=[1, 0, 2])
        return x


def rows_problem(graph: ir.Graph, nodes: Sequence[ir.Node], module: str) -> ExportError | None:
    """Why the rows of the module's calls are not the batch's; None if they are."""
    try:
        for node in nodes:
            rows_of(graph, node, module)
    except ExportError as problem:
        return problem
    return None


def rows_of(graph: ir.Graph, node: ir.Node, module: str) -> Rows:
    """The layout of the input of the product `node`.

    Raises:
        ExportError: its rows are not those of the batch, or the graph does not show them.
    """
    return _rows(graph, input_of(node), output_of(node), module)


def rows_of_output(graph: ir.Graph, value: ir.Value, module: str) -> Rows:
    """The layout of the module's output, as `rows_of`."""
    return _rows(graph, value, value, module)


def _rows(graph: ir.Graph, x: ir.Value | None, y: ir.Value, module: str) -> Rows:
    seen = None if x is None else seen_at(x)
    if x is not None and _serves_all_rows(graph, x, y):
        return Rows(x, repeated=True)
    if x is not None and seen is not None:
        return _seen_rows(x, seen, module)
    shape = x.shape if x is not None and x.shape is not None else y.shape
    why = not_run(graph)
    if x is None or shape is None:
        raise ExportError(
            f"{module}: the graph does not specify the shape of its input"
            + ("" if why is None else f", and it does not run here: {why[:_SHOWN]}")
        )
    if len(shape) == 2 and _is_flattened(graph, x):
        return Rows(x, flattened=True, rank=2)
    exactly = len(shape) == 2 or why is not None
    if len(shape) not in (2, 3) or not _is_batch(graph, shape, exactly=exactly):
        raise ExportError(
            f"{module} takes an input of shape {shape}, whose rows are not those of the batch and"
            " cannot have separate adapters: merge the adapter instead"
            + ("" if why is None else f" (the graph does not run here: {why[:_SHOWN]})")
        )
    return Rows(x, no_sequence=len(shape) == 2, rank=len(shape))


def _serves_all_rows(graph: ir.Graph, x: ir.Value, y: ir.Value) -> bool:
    """Whether a product [1, sequence, in] → `y` is computed once, and then repeated for each row.

    DeBERTa's relative positions are. An update [batch, sequence, out] is added before that.
    """
    repeated = repeated_for_rows(y)
    if repeated is None:
        return False
    before, after = seen_at(x), seen_at(repeated)
    if before is not None and after is not None:
        once = before.rows is None and len(before.shape) == 3 and before.shape[0] == 1
        return once and after.rows == FRONT and after.shape[0] == after.batch
    if x.shape is None or repeated.shape is None:
        return False
    once = len(x.shape) == 3 and x.shape[0] == 1
    return once and _is_batch(graph, repeated.shape, exactly=True)


def _seen_rows(x: ir.Value, seen: Seen, module: str) -> Rows:
    """The layout of `x` as observed in a run of the graph."""
    rank = len(seen.shape)
    if seen.rows == FRONT and rank in (2, 3):
        return Rows(x, no_sequence=rank == 2, rank=rank)
    if seen.rows == SECOND:
        return Rows(x, sequence_first=True, rank=rank)
    if seen.rows in (FRONT, FLATTENED) and rank > 1:
        return Rows(x, flattened=True, rank=rank)
    raise ExportError(
        f"{module} takes an input of shape {list(seen.shape)} for a batch of {seen.batch}, whose"
        " rows are not those of the batch and cannot have separate adapters: merge the adapter"
        " instead"
    )


def _is_batch(graph: ir.Graph, shape: ir.Shape, *, exactly: bool) -> bool:
    """Whether the first dimension is the batch's, which is that of the graph's first input.

    A symbol that no input has may be the same size, unless `exactly` the batch's is required.
    """
    first = first_input(graph)
    if first is None or not first.shape:
        return False
    batch, rows = first.shape[0], shape[0]
    if batch == rows:
        return True
    elsewhere = any(rows in value.shape for value in graph.inputs if value.shape is not None)
    return not (exactly or elsewhere or isinstance(rows, int))


def _is_flattened(graph: ir.Graph, value: ir.Value) -> bool:
    """Whether `value` [rows, …] is computed, row by row, from a reshaped [batch, sequence, …]."""
    current: ir.Value | None = value
    while current is not None and (node := current.producer()) is not None:
        if node.op_type == "Reshape":
            whole = node.inputs[0]
            shape = None if whole is None else whole.shape
            return shape is not None and len(shape) == 3 and _is_batch(graph, shape, exactly=False)
        if node.op_type not in _ROW_BY_ROW or _mixes_rows(node):
            return False
        current = next((v for v in node.inputs if v is not None and not v.is_initializer()), None)
    return False


def _mixes_rows(node: ir.Node) -> bool:
    """Whether a row of the node's result depends on several rows, despite `_ROW_BY_ROW`."""
    if node.op_type in PRODUCTS:
        transposed = node.attributes.get("transA")
        data = node.inputs[0]
        return (
            data is None
            or data.is_initializer()
            or (transposed is not None and transposed.as_int() != 0)
        )
    axis = node.attributes.get("axis")
    return axis is not None and axis.as_int() == 0

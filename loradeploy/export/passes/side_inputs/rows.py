"""Where a product has the rows of a batch, each of which can have an adapter of its own."""

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

# What gives each row of its result from the same row of its (first) input.
_ROW_BY_ROW: Final = (
    *("Add", "Cast", "Clip", "Div", "Dropout", "Elu", "Erf", "Gelu", "Identity"),
    *("LayerNormalization", "Mul", "RMSNormalization", "Relu", "Sigmoid"),
    *("SimplifiedLayerNormalization", "SkipLayerNormalization", "Softplus", "Sub", "Tanh"),
    *PRODUCTS,
)

# Of what onnxruntime says about a graph that it does not run.
_SHOWN: Final = 120


@dataclass(frozen=True, eq=False)
class Rows:
    """Where a product's rows are, so that each row of a batch can have its own adapter.

    `x`: [batch, sequence, in]; [batch, in] where there is `no_sequence`; where it is `flattened`,
    [batch · sequence, in], or of more axes with the batch's rows one block behind the other;
    [sequence, batch, in] where the `sequence_first`. `rank`: its number of axes.
    """

    x: ir.Value
    no_sequence: bool = False
    flattened: bool = False
    sequence_first: bool = False
    rank: int = 3

    @property
    def moved(self) -> bool:
        """Whether the rows have to be put in front, and back again."""
        return self.flattened or self.sequence_first

    def front(self, surgery: Surgery, chain: Chain, x: ir.Value, size: int, name: str) -> ir.Value:
        """[batch, sequence, `size`] of `x`, which is as the product's input or output."""
        if self.flattened:
            return chain.add("Reshape", name, [x, surgery.unflattened(size)])
        if self.sequence_first:
            return chain.add("Transpose", name, [x], perm=[1, 0, 2])
        return x

    def back(
        self, surgery: Surgery, chain: Chain, x: ir.Value, like: ir.Value, size: int, name: str
    ) -> ir.Value:
        """`x` [batch, sequence, `size`] with its rows where `like`, of the product, has them."""
        if self.flattened and self.rank == 2:
            return chain.add("Reshape", name, [x, surgery.integers(f"flat_{size}", [-1, size])])
        if self.flattened:
            return chain.add("Reshape", name, [x, chain.shape(f"{name}_shape", like)])
        if self.sequence_first:
            return chain.add("Transpose", name, [x], perm=[1, 0, 2])
        return x


def rows_problem(graph: ir.Graph, nodes: Sequence[ir.Node], module: str) -> ExportError | None:
    """Why the rows of the module's calls are not the batch's; None where they are."""
    try:
        for node in nodes:
            rows_of(graph, node, module)
    except ExportError as problem:
        return problem
    return None


def rows_of(graph: ir.Graph, node: ir.Node, module: str) -> Rows:
    """The rows of the product `node`.

    Raises:
        ExportError: its input does not have the batch in front, or the graph does not tell.
    """
    return _rows(graph, input_of(node), output_of(node), module)


def rows_of_output(graph: ir.Graph, value: ir.Value, module: str) -> Rows:
    """The rows of what the module gives, as `rows_of`."""
    return _rows(graph, value, value, module)


def _rows(graph: ir.Graph, x: ir.Value | None, y: ir.Value, module: str) -> Rows:
    seen = None if x is None else seen_at(x)
    if x is not None and _serves_all_rows(graph, x, y):
        return Rows(x)
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
            " cannot have adapters of their own: merge the adapter instead"
            + ("" if why is None else f" (the graph does not run here: {why[:_SHOWN]})")
        )
    return Rows(x, no_sequence=len(shape) == 2, rank=len(shape))


def _serves_all_rows(graph: ir.Graph, x: ir.Value, y: ir.Value) -> bool:
    """Whether a product [1, sequence, in] → `y` is computed once, and then repeated for each row.

    So are DeBERTa's relative positions. An update [batch, sequence, out] is added before that.
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
    """The rows of `x` as they were seen where the graph ran."""
    rank = len(seen.shape)
    if seen.rows == FRONT and rank in (2, 3):
        return Rows(x, no_sequence=rank == 2, rank=rank)
    if seen.rows == SECOND:
        return Rows(x, sequence_first=True, rank=rank)
    if seen.rows in (FRONT, FLATTENED) and rank > 1:
        return Rows(x, flattened=True, rank=rank)
    raise ExportError(
        f"{module} takes an input of shape {list(seen.shape)} for a batch of {seen.batch}, whose"
        " rows are not those of the batch and cannot have adapters of their own: merge the adapter"
        " instead"
    )


def _is_batch(graph: ir.Graph, shape: ir.Shape, *, exactly: bool) -> bool:
    """Whether the first dimension is the batch's, as the graph's first input has it.

    A symbol that no input has may be the same number, unless it has to be `exactly` the batch's.
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
    """Whether `value` [rows, …] comes of reshaping [batch, sequence, …], row by row."""
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
    """Whether a row of the node's result comes of several, which `_ROW_BY_ROW` cannot tell."""
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

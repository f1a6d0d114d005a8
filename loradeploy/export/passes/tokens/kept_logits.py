"""Compute the logits of selected positions only, such as the last one of a prefill.

    hidden [batch, sequence, size] → head    becomes    kept [batch, kept, size] → head

    logits_to_keep [1, 0]            the default: all positions, kept is hidden
                   [1, kept]         these positions of every row; -1 is the last
                   [batch, kept]     other positions for each row, for rows of different lengths

    kept = Concat(GatherND(hidden, Expand(logits_to_keep, [batch, 1])), hidden[:, kept · 2⁴⁰:])

One of the two parts is empty: either no position is listed, or the slice begins after the last one.
Values computed from sizes are used on the host only, so that nothing is copied to the device or
back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.names import INPUT_IDS, KEPT, LOGITS_TO_KEEP
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    Chain,
    add_constant,
    add_optional_input,
    constant_of,
    graph_input,
    is_initialized,
    remove_optional_input,
    remove_unused,
)
from loradeploy.export.graph.names import step_name
from loradeploy.export.match.products import products

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.bundle.manifest import Manifest

_NODE: Final = step_name(LOGITS_TO_KEEP, "kept")
# Each listed position moves the begin of the slice by this; the product does not overflow int64.
_BEHIND_ALL: Final = 1 << 40
# The first opset in which Shape has a start and an end.
_SHAPE_OF_AXES: Final = 15
# Operators whose result at a position depends on that position of their inputs only.
_BY_POSITION: Final = (
    *("Add", "Cast", "Div", "FusedMatMul", "Gemm", "Identity", "MatMul", "MatMulNBits", "Mul"),
    *("MatMulBnb4", "Neg", "Sub", "Tanh"),
)


def logits_to_keep_problem(graph: ir.Graph, manifest: Manifest) -> str | None:
    """Why the graph of `manifest` cannot have the input `logits_to_keep`; None if it can."""
    found = _head_input(graph, output_of(manifest))
    return found if isinstance(found, str) else None


def add_logits_to_keep(graph: ir.Graph, manifest: Manifest) -> None:
    """Add the input `logits_to_keep` to the graph of a decoder's `manifest`.

    Raises:
        ExportError: the graph does not support it, see `logits_to_keep_problem`.
    """
    import onnx_ir as ir

    name = output_of(manifest)
    hidden = _head_input(graph, name)
    if isinstance(hidden, str):
        raise ExportError(f"`logits_to_keep`: {hidden}")
    before = hidden.producer()
    logits = next(value for value in graph.outputs if value.name == name)
    assert before is not None
    uses = [(node, index) for node, index in hidden.uses() if _leads_to(node, logits)]
    none = np.zeros((1, 0), np.int64)
    kept = add_optional_input(graph, LOGITS_TO_KEEP, none, ["rows", KEPT])

    def constant(name: str, number: int) -> ir.Value:
        return add_constant(graph, step_name(LOGITS_TO_KEEP, name), np.array([number], np.int64))

    one, last = constant("one", 1), constant("last", -1)
    sizes = Chain(graph, before, LOGITS_TO_KEEP, ir.DataType.INT64)

    def size(name: str, value: ir.Value, axis: int) -> ir.Value:
        if manifest.opset >= _SHAPE_OF_AXES:
            return sizes.add("Shape", name, [value], start=axis, end=axis + 1)
        whole = sizes.add("Shape", f"{name}_shape", [value])
        return sizes.add("Gather", name, [whole, constant(f"{name}_axis", axis)], axis=0)

    batch = size("batch", hidden, 0)
    rows = sizes.add("Concat", "rows", [batch, one], axis=0)  # [batch, 1]
    listed = sizes.add("Expand", "listed", [kept, rows])  # [batch, kept]
    listed = sizes.add("Unsqueeze", "indices", [listed, last])  # [batch, kept, 1]
    count = size("count", kept, 1)
    begin = sizes.add("Mul", "begin", [count, constant("behind_all", _BEHIND_ALL)])
    end = constant("end", np.iinfo(np.int64).max)
    assert hidden.dtype is not None
    values = Chain(graph, sizes.last, LOGITS_TO_KEEP, hidden.dtype)
    chosen = values.add("GatherND", "chosen", [hidden, listed], batch_dims=1)
    rest = values.add("Slice", "rest", [hidden, begin, end, one])
    result = values.add("Concat", "kept", [chosen, rest], axis=1)  # [batch, kept, size]
    for node, index in uses:
        node.replace_input_with(index, result)
    result.shape = hidden.shape
    _set_dimension(result, KEPT)


def remove_logits_to_keep(graph: ir.Graph, manifest: Manifest) -> None:
    """Undo `add_logits_to_keep`.

    Raises:
        ExportError: the graph does not have the input.
    """

    node = next((node for node in graph if node.name == _NODE), None)
    chosen = None if node is None or node.inputs[0] is None else node.inputs[0].producer()
    hidden = None if chosen is None else chosen.inputs[0]
    if node is None or hidden is None or LOGITS_TO_KEEP not in graph.initializers:
        raise ExportError(
            f"the graph lacks the input {LOGITS_TO_KEEP} that its manifest lists: it was changed"
        )
    ids = graph_input(graph, INPUT_IDS)
    if ids is not None and ids.shape is not None:
        _set_dimension(node.outputs[0], ids.shape[1])
    node.outputs[0].replace_all_uses_with(hidden)
    remove_optional_input(graph, LOGITS_TO_KEEP)
    remove_unused(graph)


def _head_input(graph: ir.Graph, name: str) -> ir.Value | str:
    """The output head's input, of all positions; or why positions cannot be selected there."""
    output = next((value for value in graph.outputs if value.name == name), None)
    ids = graph_input(graph, INPUT_IDS)
    if output is None or ids is None:
        return "the graph has no logits, or takes no input_ids"
    if ids.shape is None or output.shape is None or len(output.shape) != 3 or len(ids.shape) != 2:
        return "the graph does not give logits [batch, sequence, vocabulary]"
    if isinstance(ids.shape[1], int) or ids.shape[1] != output.shape[1]:
        return "the graph's logits are not one for each of its input_ids, or of a fixed number"
    if LOGITS_TO_KEEP in graph.initializers or graph_input(graph, LOGITS_TO_KEEP) is not None:
        return f"the graph has a value named {LOGITS_TO_KEEP}"
    weights = {product.node for product in products(graph)}
    behind: set[ir.Node] = set()  # the head and the nodes after it
    value: ir.Value | None = output
    while value is not None and (node := value.producer()) is not None:
        behind.add(node)
        if node in weights:
            break
        if node.op_type not in _BY_POSITION:
            return f"between the output head and the logits is a {node.op_type}"
        value = next((v for v in node.inputs if v is not None and v.producer() is not None), None)
    else:
        return "no product with a constant weight gives the logits"
    hidden = node.inputs[0]
    if hidden is None or hidden.producer() is None or hidden.dtype is None:
        return "the input of the output head is not known"
    if hidden.shape is not None and len(hidden.shape) != 3:
        return "the output head takes all rows in one"
    if _is_cut(hidden):  # whatever shape the logits are declared to have
        return "the graph gives the logits of its last tokens alone"
    return _crossing(graph, hidden, output) or hidden


def _is_cut(hidden: ir.Value) -> bool:
    """Whether `hidden` is a slice of the positions already, with a constant begin."""
    node = hidden.producer()
    if node is None or node.op_type != "Slice" or len(node.inputs) < 2:
        return False
    begin = node.inputs[1]
    return is_initialized(begin) and bool(constant_of(begin).any())


def _crossing(graph: ir.Graph, hidden: ir.Value, logits: ir.Value) -> str | None:
    """Why positions cannot be selected between `hidden` and `logits`; None if they can."""
    side_inputs = {value for value in graph.inputs if value.is_initializer()}
    between = {node for node in _after(hidden) if _leads_to(node, logits)}
    outer: list[ir.Value] = []
    for node in between:
        if node.op_type not in _BY_POSITION:
            return f"between the output head and the logits is a {node.op_type}"
        for value in node.outputs:
            used = value.is_graph_output() and value is not logits
            if used or any(user not in between for user, _ in value.uses()):
                return f"{node.name or node.op_type} of the output head gives another output too"
        outer += [v for v in node.inputs if v is not None and v is not hidden]
    # Their other inputs may come from weights and side inputs only, which have no positions.
    seen: set[ir.Value] = set()
    while outer:
        value = outer.pop()
        maker = value.producer()
        if value in seen or maker in between:
            continue
        seen.add(value)
        if value is hidden or (value.is_graph_input() and value not in side_inputs):
            return "the output head reads something besides the last layer's states"
        outer += [] if maker is None else [v for v in maker.inputs if v is not None]
    return None


def _after(value: ir.Value) -> set[ir.Node]:
    """The nodes that are computed from `value`."""
    found: set[ir.Node] = set()
    waiting = [node for node, _ in value.uses()]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [user for output in node.outputs for user, _ in output.uses()]
    return found


def _leads_to(node: ir.Node, value: ir.Value) -> bool:
    """Whether `value` is computed from the outputs of `node`."""
    return value in node.outputs or any(
        value in later.outputs for output in node.outputs for later in _after(output)
    )


def _set_dimension(kept: ir.Value, size: int | ir.SymbolicDim | str) -> None:
    """Declare the number of positions of `kept` and of all values that are computed from it.

    onnxruntime lets values of equal declared shapes share memory: it fails if they are not equal.
    """
    import onnx_ir as ir

    for value in (kept, *(output for node in _after(kept) for output in node.outputs)):
        if value.shape is not None and len(value.shape) == 3:
            value.shape = ir.Shape([value.shape[0], size, value.shape[2]])

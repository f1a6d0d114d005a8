"""Validate a graph that was read from a file, before it is used.

tensors     have a known dtype, a plausible size, and as many bytes as their shape needs
values      are defined before they are used: no cycles, no undefined values
functions   do not call each other in a cycle, and have a limited size when inlined
the rest    (arities, attributes, contradicting types and shapes) is checked by onnxruntime, which
            opens the file without running or optimizing it
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.errors import ModelError, first_line, shortened, shown
from loradeploy.export.graph.edit import bodies_of
from loradeploy.export.graph.running import NotRunError, open_graph

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir

_MAX_BYTES: Final = 2**46
_MAX_INPUT: Final = 2**28  # values; images and audio have far fewer
# The largest traced models have some ten thousands.
_MAX_NODES: Final = 1_000_000


def check_sound(model: ir.Model, file: Path) -> None:
    """Raise ModelError unless `model`, read from `file`, is a valid graph.

    `load_graph` checks external tensors.
    """
    try:
        for tensor in _tensors(model):
            _check_tensor(tensor)
        for value in model.graph.inputs:
            if not value.is_initializer():
                _check_input(value)
        _check_values(model.graph, frozenset())
        for function in model.functions.values():
            _check_values(function.graph, frozenset())
        _check_functions(model)
    except ModelError as problem:
        raise ModelError(f"{file} is not a valid ONNX model: {problem}") from None
    except RecursionError:
        raise ModelError(
            f"{file} is not a valid ONNX model: its graphs are nested too deeply"
        ) from None


def check_opens(file: Path) -> dict[str, list[int | str | None]]:
    """The shapes of the outputs by name, as onnxruntime infers them; empty if it lacks kernels.

    Raises:
        ModelError: onnxruntime refuses `file`.
    """
    try:
        outputs = open_graph(file, optimized=False).get_outputs()
        # It gives [] for an unknown shape.
        return {node.name: list(node.shape) for node in outputs if node.shape}
    except NotRunError as problem:
        if not problem.lacking:
            raise ModelError(
                f"{file} is not an ONNX model that onnxruntime can open: {problem}"
            ) from None
        return {}


def _tensors(model: ir.Model) -> Iterator[Any]:
    import onnx_ir as ir

    bodies = [*model.graphs(), *(function.graph for function in model.functions.values())]
    for body in bodies:
        for value in body.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in body:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.value
                elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
                    yield from attribute.value


def _check_tensor(tensor: Any) -> None:
    name = shortened(str(tensor.name))
    try:
        sizes = [int(size) for size in tensor.shape]
        dtype = tensor.dtype
    except Exception as problem:  # an unknown dtype
        raise ModelError(f"the tensor {name}: {first_line(problem)}") from None
    if any(size < 0 for size in sizes) or math.prod(size or 1 for size in sizes) > _MAX_BYTES:
        raise ModelError(f"the tensor {name} has the shape {shown(sizes)}")
    import onnx_ir as ir

    if isinstance(tensor, ir.ExternalTensor):
        return
    try:
        proto: Any = getattr(tensor, "raw", None)
        if dtype != ir.DataType.STRING and getattr(proto, "raw_data", b""):
            size = len(proto.raw_data)
            if size != tensor.nbytes:
                raise ModelError(
                    f"the tensor {name} has {size} bytes, its shape needs {tensor.nbytes}"
                )
        else:
            tensor.numpy()
    except ModelError:
        raise
    except Exception as problem:  # of numpy, protobuf or onnx-ir
        raise ModelError(f"the tensor {name}: {first_line(problem)}") from None


def _check_input(value: ir.Value) -> None:
    """Raise ModelError for an implausible input size, since trial runs use it."""
    sizes = [] if value.shape is None else [s for s in value.shape if isinstance(s, int)]
    if any(size < 0 for size in sizes) or math.prod(size or 1 for size in sizes) > _MAX_INPUT:
        raise ModelError(f"its input {shortened(str(value.name))} has the shape {shown(sizes)}")


def _check_values(graph: ir.Graph, outer: frozenset[ir.Value]) -> None:
    """Raise ModelError unless every value is defined before it is used."""
    known = {*graph.inputs, *graph.initializers.values()}
    nodes = list(graph)
    if not _in_order(nodes, known, outer):
        try:
            graph.sort()
        except ValueError:
            raise ModelError("its nodes form a cycle") from None
    made = set(known)
    for node in graph:
        if not node.outputs:
            raise ModelError(f"{_of(node)} has no outputs")
        _check_names(node)
        for value in node.inputs:
            if value is not None and value not in made and value not in outer:
                raise ModelError(
                    f"{_of(node)} uses {shortened(str(value.name))}, which is not defined"
                )
        for body in bodies_of(node):
            _check_values(body, outer | made)
        made.update(node.outputs)
    for value in graph.outputs:
        if value not in made and value not in outer:
            raise ModelError(f"its output {shortened(str(value.name))} is not defined")


def _check_names(node: ir.Node) -> None:
    """Raise ModelError for a name that is not UTF-8, which protobuf returns as bytes."""
    metadata = node.metadata_props
    texts = [node.name, node.op_type, node.domain, *metadata, *metadata.values()]
    texts += [value.name for value in (*node.inputs, *node.outputs) if value is not None]
    if odd := [text for text in texts if not isinstance(text, str | None)]:
        raise ModelError(f"a name in it is {shown(odd[0])}, which is not UTF-8")


def _in_order(nodes: Iterable[ir.Node], known: set[ir.Value], outer: frozenset[ir.Value]) -> bool:
    """Whether every value that a node or its bodies use is defined before the node."""
    made = set(known)
    for node in nodes:
        if any(v not in made and v not in outer for v in _used(node)):
            return False
        made.update(node.outputs)
    return True


def _used(node: ir.Node) -> set[ir.Value]:
    """The values that `node` takes, and those of outer graphs that its bodies use."""
    used = {value for value in node.inputs if value is not None}
    for body in bodies_of(node):
        inside = {*body.inputs, *body.initializers.values()}
        inside.update(value for each in body for value in each.outputs)
        outer = {value for each in body for value in _used(each)} | set(body.outputs)
        used |= outer - inside
    return used


def _check_functions(model: ir.Model) -> None:
    """Raise ModelError if a function calls itself, or the inlined graph has too many nodes."""
    sizes: dict[Any, int] = {}
    open_calls: set[Any] = set()

    def size_of(graph: ir.Graph) -> int:
        total = 0
        for node in graph:
            called = node.op_identifier()
            total += of_function(called) if called in model.functions else 1
            total += sum(size_of(body) for body in bodies_of(node))
        return total

    def of_function(called: Any) -> int:
        if called in open_calls:
            raise ModelError(f"its function {shortened(str(called[1]))} calls itself")
        if called not in sizes:
            open_calls.add(called)
            sizes[called] = size_of(model.functions[called].graph)
            open_calls.remove(called)
        return sizes[called]

    if (count := size_of(model.graph)) > _MAX_NODES:
        raise ModelError(
            f"it has {shown(count)} nodes with its functions written out, {_MAX_NODES:,} are the"
            " most"
        )


def _of(node: ir.Node) -> str:
    return f"the {node.op_type} {shortened(str(node.name))}"

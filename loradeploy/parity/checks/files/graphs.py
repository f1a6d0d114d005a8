"""The graphs of a bundle, read once for all checks of its files, and whether two are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loradeploy.bundle.names import ENCODER_NAME, GRAPH_NAME
from loradeploy.errors import shown
from loradeploy.export.graph.file import load_graph, spec_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.parity.context import CheckContext


@dataclass(frozen=True, eq=False)
class BundleGraphs:
    """The graph in model.onnx, and an encoder-decoder's encoder. Weights are read when needed."""

    decoder: ir.Model
    encoder: ir.Model | None = None

    @property
    def each(self) -> tuple[ir.Model, ...]:
        """Both graphs, or the only one."""
        return (self.decoder,) if self.encoder is None else (self.decoder, self.encoder)

    @property
    def initializers(self) -> dict[str, ir.Value]:
        """The constants of both graphs by name."""
        return {
            str(name): value
            for graph in reversed(self.each)
            for name, value in graph.graph.initializers.items()
        }


def read_graphs(context: CheckContext) -> BundleGraphs:
    """Read the graphs of the bundle.

    Raises:
        ModelError: one of them cannot be read.
    """
    names = [GRAPH_NAME] if context.manifest.encoder is None else [GRAPH_NAME, ENCODER_NAME]
    return BundleGraphs(*(load_graph(context.bundle / name) for name in names))


def difference(own: ir.Model, other: ir.Model) -> str | None:
    """Where the two graphs compute something else; None if they are the same.

    Compared are inputs, outputs, constants by value, and nodes by what they compute and read, in
    any order. Names of nodes, metadata and the versions of the file do not count.
    """
    if (versions := dict(own.opset_imports)) != dict(other.opset_imports):
        return f"its operator sets are {shown(versions)}"
    functions = [{key: _nodes(f) for key, f in m.functions.items()} for m in (own, other)]
    if functions[0] != functions[1]:
        return "its functions differ"
    return _graph_difference(own.graph, other.graph)


def _graph_difference(own: ir.Graph, other: ir.Graph) -> str | None:
    for what, values in (("inputs", _values(own.inputs, other.inputs)),
                         ("outputs", _values(own.outputs, other.outputs))):  # fmt: skip
        if values[0] != values[1]:
            return f"its {what} differ"
    nodes = [_nodes(graph) for graph in (own, other)]
    for made in {**nodes[0], **nodes[1]}:
        if nodes[0].get(made) != nodes[1].get(made):
            return f"the node that computes {', '.join(made)} differs"
    constants = [
        {name: value.const_value for name, value in graph.initializers.items()}
        for graph in (own, other)
    ]
    for name in {**constants[0], **constants[1]}:
        if not _same_tensor(*(each.get(name) for each in constants)):
            return f"the constant {name} differs"
    return None


def _values(*sides: Any) -> list[list[Any]]:
    return [[spec_of(value) for value in values] for values in sides]


def _nodes(graph: Any) -> Mapping[tuple[str, ...], Any]:
    """What each node computes, by the names of its outputs."""
    return {
        tuple(str(value.name) for value in node.outputs): (
            node.domain or "ai.onnx",
            node.op_type,
            node.overload,
            tuple(None if value is None else value.name for value in node.inputs),
            dict(_attributes(node)),
        )
        for node in graph
    }


def _attributes(node: ir.Node) -> Iterator[tuple[str, Any]]:
    import onnx_ir as ir

    for name, attribute in node.attributes.items():
        value = attribute.value
        if attribute.is_ref():
            value = attribute.ref_attr_name
        elif attribute.type == ir.AttributeType.GRAPH:
            value = _Inner(value)
        elif attribute.type == ir.AttributeType.TENSOR:
            value = (value.dtype, value.shape, value.tobytes())
        elif attribute.type == ir.AttributeType.GRAPHS:
            value = tuple(map(_Inner, value))
        yield name, (attribute.type, value)


@dataclass(frozen=True, eq=False)
class _Inner:
    """The graph of a branch, equal to another one that computes the same."""

    graph: ir.Graph

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Inner) and _graph_difference(self.graph, other.graph) is None

    __hash__ = None  # type: ignore[assignment]


def _same_tensor(own: Any, other: Any) -> bool:
    """Whether two constants are equal; those at one place of the data file are not read."""
    if own is None or other is None:
        return own is other
    if (own.dtype, own.shape) != (other.dtype, other.shape):
        return False
    places = [getattr(tensor, "location", None) for tensor in (own, other)]
    spans = [(getattr(t, "offset", None), getattr(t, "length", None)) for t in (own, other)]
    if places[0] is not None and places[0] == places[1] and spans[0] == spans[1]:
        return True
    return bool(own.tobytes() == other.tobytes())

"""Small steps of graph surgery: constants, chains of nodes, values that take over from others."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_IR_VERSION: Final = 10  # of a model that is made for a pass alone


class Chain:
    """Nodes put into `graph` one behind the other, the first behind `node`.

    Every node is called `label`/name, and so is its one output, of type `dtype`; the label may
    change on the way.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node, label: str, dtype: ir.DataType) -> None:
        self._graph = graph
        self.label = label
        self._dtype = dtype
        self.last = node
        self.readers: set[ir.Node] = set()

    def add(
        self, op: str, name: str, inputs: list[ir.Value], **attributes: int | list[int]
    ) -> ir.Value:
        """The output of a new node."""
        import onnx_ir as ir

        node = ir.node(op, inputs, attributes=attributes, name=f"{self.label}/{name}")
        node.outputs[0].name = node.name
        node.outputs[0].dtype = self._dtype
        self._graph.insert_after(self.last, node)
        self.last = node
        return node.outputs[0]

    def shape(self, name: str, value: ir.Value) -> ir.Value:
        """The shape of `value`, as numbers in the graph; the node is one of the `readers`."""
        import onnx_ir as ir

        shape = self.add("Shape", name, [value])
        shape.dtype = ir.DataType.INT64
        self.readers.add(self.last)
        return shape


def constant_of(value: ir.Value) -> NDArray[Any]:
    """The numbers of an initializer."""
    if value.const_value is None:
        raise ValueError(f"{value.name} is no constant")
    return value.const_value.numpy()


def set_constant(value: ir.Value, numbers: NDArray[Any]) -> None:
    """Give an initializer other numbers of the same dtype and shape."""
    import onnx_ir as ir

    value.const_value = ir.tensor(numbers, name=value.name)


def add_constant(
    graph: ir.Graph,
    name: str,
    numbers: NDArray[Any],
    *,
    shape: list[int | str] | None = None,
) -> ir.Value:
    """A new initializer; `shape` says what may be fed in its place where it is an input too."""
    import onnx_ir as ir

    tensor = ir.tensor(numbers, name=name)
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(numbers.shape if shape is None else shape),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def free_name(graph: ir.Graph, name: str) -> str:
    """`name`, or what comes near it and no initializer has."""
    while name in graph.initializers:
        name += ".own"
    return name


def replace_uses(old: ir.Value, new: ir.Value, *, keep: Collection[ir.Node] = ()) -> None:
    """Let every user of `old` but those in `keep` use `new`, which gets its type and shape.

    As a graph output `new` takes its name too.
    """
    kept = [(node, index) for node, index in old.uses() if node in keep]
    output = old.name if old.is_graph_output() else None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    for node, index in kept:
        node.replace_input_with(index, old)
    new.type, new.shape = old.type, old.shape
    if output is not None:
        old.name, new.name = f"{output}/before", output


def source_of(value: ir.Value | None, carriers: Collection[str]) -> ir.Value | None:
    """Where `value` comes from through nodes of the operators `carriers`; None through others."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in carriers:
            return None
        value = node.inputs[0]
    return value


def bodies_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The branches of an If, the body of a loop: the graphs within `node`."""
    import onnx_ir as ir

    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def remove_all(graph: ir.Graph) -> None:
    """Remove all nodes, those within them too: what is outside of them is no longer used."""
    for node in list(graph):
        for body in bodies_of(node):
            body.outputs.clear()
            remove_all(body)
    graph.remove(list(graph), safe=True)


def integer_of(node: ir.Node, name: str) -> bool:
    """Whether the attribute `name`, a whole number, is there and not 0."""
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())


def number_of(node: ir.Node, name: str) -> float:
    """The attribute `name`, a factor: 1 where it is not there."""
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else float(attribute.as_float())


def remove_unused(graph: ir.Graph) -> None:
    """Drop nodes and constants that nothing uses; what is an input stays."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=_IR_VERSION))


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that alone uses `value`; None where it is an output of the graph too."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None

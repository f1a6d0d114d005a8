"""Basic steps of graph surgery: constants, chains of nodes, replacing values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from loradeploy.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_IR_VERSION: Final = 10  # of a model created only to run a pass


class Chain:
    """Nodes inserted into `graph` one after another, after `node`.

    Each node and its one output, of type `dtype`, are named `label`/name; the label may be changed
    in between.
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
        """The shape of `value`, computed in the graph; adds the node to `readers`."""
        import onnx_ir as ir

        shape = self.add("Shape", name, [value])
        shape.dtype = ir.DataType.INT64
        self.readers.add(self.last)
        return shape


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """The input of `node` at `index`, or None."""
    return node.inputs[index] if len(node.inputs) > index else None


def constant_of(value: ir.Value) -> NDArray[Any]:
    """The values of an initializer."""
    if value.const_value is None:
        raise ValueError(f"{value.name} is not a constant")
    return value.const_value.numpy()


def set_constant(value: ir.Value, numbers: NDArray[Any]) -> None:
    """Replace the values of an initializer by others of the same dtype and shape."""
    import onnx_ir as ir

    value.const_value = ir.tensor(numbers, name=value.name)


def set_computed(value: ir.Value, compute: Callable[[], NDArray[Any]]) -> None:
    """As `set_constant`, with values that `compute` returns each time they are needed."""
    import onnx_ir as ir

    tensor = value.const_value
    assert tensor is not None
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(compute(), dtype=tensor.dtype, name=value.name),
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=value.name,
    )


def add_constant(graph: ir.Graph, name: str, numbers: NDArray[Any]) -> ir.Value:
    """A new initializer."""
    import onnx_ir as ir

    return add_tensor(graph, ir.tensor(numbers, name=name))


def add_tensor(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """As `add_constant`, for a tensor with a name, whose values may be computed later."""
    import onnx_ir as ir

    value = ir.Value(
        name=tensor.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def add_optional_input(
    graph: ir.Graph, name: str, default: NDArray[Any], shape: Sequence[int | str]
) -> ir.Value:
    """A new input for feeds of `shape`, with the value `default` if nothing is fed.

    Raises:
        ExportError: a value of the graph already has this name.
    """
    import onnx_ir as ir

    if name in graph.initializers or graph_input(graph, name) is not None:
        raise ExportError(f"the graph already has a value named {name}")
    value = add_constant(graph, name, default)
    value.shape = ir.Shape(shape)
    graph.inputs.append(value)
    return value


def remove_optional_input(graph: ir.Graph, name: str) -> None:
    """Remove an input that has a default."""
    graph.inputs.remove(graph.initializers.pop(name))


def graph_input(graph: ir.Graph, name: str) -> ir.Value | None:
    """The input of this name; None if there is none."""
    return next((value for value in graph.inputs if value.name == name), None)


def shared_constant(graph: ir.Graph, name: str, numbers: NDArray[Any]) -> ir.Value:
    """The initializer `name`, which is added with the values `numbers` if it does not exist."""
    value = graph.initializers.get(name)
    return add_constant(graph, name, numbers) if value is None else value


def free_name(graph: ir.Graph, name: str) -> str:
    """`name`, with a suffix if an initializer has it already."""
    while name in graph.initializers:
        name += ".own"
    return name


def value_names(graph: ir.Graph) -> set[str]:
    """The names of all values, including those in branches and loops."""
    names = {str(value.name) for value in (*graph.inputs, *graph.initializers.values())}
    for node in graph:
        names.update(str(value.name) for value in node.outputs)
        for body in bodies_of(node):
            names |= value_names(body)
    return names


def taken_name(names: set[str], name: str) -> str:
    """`name`, with a suffix if it is among `names`, to which it is added."""
    while name in names:
        name += ".own"
    names.add(name)
    return name


def replace_uses(old: ir.Value, new: ir.Value, *, keep: Collection[ir.Node] = ()) -> None:
    """Replace `old` by `new` in all users but those in `keep`; `new` gets its type and shape.

    If `old` is a graph output, `new` gets its name too.
    """
    kept = [(node, index) for node, index in old.uses() if node in keep]
    output = old.name if old.is_graph_output() else None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    for node, index in kept:
        node.replace_input_with(index, old)
    new.type, new.shape = old.type, old.shape
    if output is not None:
        old.name, new.name = f"{output}/before", output


def replace_node(old: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Put `nodes` in the place of `old`; the last one's output takes its output's name."""
    graph, result, value = old.graph, old.outputs[0], nodes[-1].outputs[0]
    assert graph is not None
    name = result.name
    graph.insert_after(old, nodes)
    replace_uses(result, value)
    graph.remove(old, safe=True)
    value.name = name


def value_behind(value: ir.Value | None, carriers: Collection[str]) -> ir.Value | None:
    """The value from which only `carriers` compute `value`: their first inputs are followed."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in carriers:
            return value
        value = node.inputs[0]
    return value


def source_of(value: ir.Value | None, carriers: Collection[str]) -> ir.Value | None:
    """The input from which only `carriers` compute `value`; None if there are other operators."""
    behind = value_behind(value, carriers)
    return None if behind is None or behind.producer() is not None else behind


def is_initialized(value: ir.Value | None) -> TypeGuard[ir.Value]:
    """Whether `value` is an initializer with values, which a feed may replace."""
    return value is not None and value.is_initializer() and value.const_value is not None


def is_fixed(value: ir.Value | None) -> TypeGuard[ir.Value]:
    """Whether `value` is an initializer with values, which no feed can replace."""
    return is_initialized(value) and not value.is_graph_input()


def bodies_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The subgraphs of `node`: branches of an If, the body of a loop."""
    import onnx_ir as ir

    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def remove_all(graph: ir.Graph) -> None:
    """Remove all nodes, including those of subgraphs, and with them the uses of outer values."""
    for node in list(graph):
        for body in bodies_of(node):
            body.outputs.clear()
            remove_all(body)
    graph.remove(list(graph), safe=True)


def integer_of(node: ir.Node, name: str) -> bool:
    """Whether the integer attribute `name` exists and is not 0."""
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())


def number_of(node: ir.Node, name: str) -> float:
    """The float attribute `name`, a factor with the default 1."""
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else float(attribute.as_float())


def remove_unused(graph: ir.Graph) -> None:
    """Remove unused nodes and constants, but not inputs."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=_IR_VERSION))


def keep_outputs(model: ir.Model, outputs: Sequence[ir.Value]) -> None:
    """Leave the `outputs` and what they need, without the inputs that nothing uses."""
    graph = model.graph
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    remove_unused(graph)
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)


def free_constants(graph: ir.Graph, constants: Iterable[ir.Value]) -> None:
    """Free the values of those `constants` that are no longer in `graph` and have no users.

    Removed nodes and values refer to each other: only the garbage collector would free them.
    """
    for value in constants:
        if not value.uses() and graph.initializers.get(str(value.name)) is not value:
            value.const_value = None


def only_user(value: ir.Value) -> ir.Node | None:
    """The only user of `value`; None if it has several or is a graph output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def name_of(node: ir.Node) -> str:
    """The name of `node`, or of its first output: other exporters leave nodes unnamed."""
    return str(node.name or node.outputs[0].name)


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """The values of the node's attributes, by name."""
    return {name: attribute.value for name, attribute in node.attributes.items()}

"""Find constant factors in a layer's module, before or after its product.

    y = s · (x W + b)      a layer that scales its output; or W was divided by s for quantization
    y = (s · x) W + b      SmoothQuant, which divides the rows of W by s

The node of the factor is in the layer's scope, by its name or metadata: it is part of the module to
whose output PEFT adds an update. An update that is added to the product would be scaled with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from loradeploy.adapter.tasks import LM_HEAD
from loradeploy.export.graph.edit import only_user
from loradeploy.export.graph.scopes import NAME_SCOPES
from loradeploy.export.match.modules.naming import is_built, module_of
from loradeploy.export.match.products import OPERATORS, input_of, output_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.export.match.linears import Linear

# The end of the names of nodes that are added for the α of a product, which is judged by itself.
SCALED: Final = "/scaled"
_SCALES: Final = ("Div", "Mul")
_PASSING: Final = ("Cast", "Identity", "Reshape")
_CARRIERS: Final = ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear")
# The operators that compute a norm's divisor or factor.
_OF_SIZE: Final = ("Clip", "Div", "Max", "Pow", "Reciprocal", "ReduceL2", "Rsqrt", "Sqrt")


def own_factor(linear: Linear) -> ir.Node | None:
    """The node that scales the input or output of `linear` inside its module, if there is one.

    Nodes that quantizers add may lack a module name: a node that scales each feature directly
    before the product counts, unless its name has a module or it is a norm's weight. So does one
    between the product and its bias. onnxruntime-genai's builder names factors of the logits after
    the head, but they belong to the model.
    """
    for product in linear.nodes:
        own = module_of(product)
        if own is None or (own[0] == LM_HEAD and is_built(product)):
            continue
        before, behind = _beside(product)
        for node in (*before, *behind):
            scope = module_of(node)
            if scope is not None and scope[0] == own[0] and any(map(_is_constant, node.inputs)):
                return node
        for node in before:
            if module_of(node) is None and _scales_features(node, linear.in_features):
                return node
        for node in behind:
            if module_of(node) is None and _precedes_bias(node, linear.out_features):
                return node
    return None


def unnamed_factor(linear: Linear) -> ir.Node | None:
    """A node without a name of the model that scales a product of `linear`, if there is one.

    A tool may have added it and divided the weight by the factor: then it is the module's, and an
    update of the product would be scaled. It may also be the model's own, after the module. Only
    the weight shows which.
    """
    for product in linear.nodes:
        own = module_of(product)
        if own is None or (own[0] == LM_HEAD and is_built(product)):
            continue
        x, node = input_of(product), only_user(output_of(product))
        while node is not None and (
            node.op_type in _PASSING
            or (node.op_type == "Add" and any(map(_is_constant, node.inputs)))
        ):
            node = only_user(node.outputs[0])
        before = None if x is None else x.producer()
        while before is not None and before.op_type in _PASSING:
            x = before.inputs[0]
            before = None if x is None else x.producer()
        for each in _scales([before, node]):
            scaled = [value for value in each.inputs if not _is_constant(value)]
            if len(scaled) != 1 or _is_named(each) or _is_normalized(scaled[0]):
                continue
            if each is node or not _is_product(scaled[0]):  # else it is behind that product
                return each
    return None


def _is_product(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.op_type in OPERATORS


def _is_named(node: ir.Node) -> bool:
    """Whether the exporter of the model named the node, if only as part of the whole model."""
    name = str(node.name)
    return name.startswith("/") or name.endswith(SCALED) or NAME_SCOPES in node.metadata_props


def _beside(product: ir.Node) -> tuple[list[ir.Node], list[ir.Node]]:
    """The nodes that scale the product's input, and its output before or after its bias."""
    x, y = input_of(product), output_of(product)
    before = None if x is None else x.producer()
    behind = [only_user(y)]
    if behind[0] is not None and behind[0].op_type == "Add":
        behind.append(only_user(behind[0].outputs[0]))
    return _scales([before]), _scales(behind)


def _scales(nodes: Sequence[ir.Node | None]) -> list[ir.Node]:
    return [n for n in nodes if n is not None and n.op_type in _SCALES and n.domain == ""]


def _precedes_bias(node: ir.Node, size: int) -> bool:
    """Whether `node` has a constant factor, and a constant [out] is added to its output."""
    adder = only_user(node.outputs[0])
    if adder is None or adder.op_type != "Add" or not any(map(_is_constant, node.inputs)):
        return False
    constants = (value for value in adder.inputs if value is not None and _is_constant(value))
    return any(v.const_value is not None and v.const_value.size == size for v in constants)


def _scales_features(node: ir.Node, size: int) -> bool:
    """Whether `node` has a constant for each of `size` features, and the input is not a norm's."""
    for value, other in (node.inputs, reversed(node.inputs)):
        if _is_constant(value) and size > 1:
            tensor = None if value is None else value.const_value
            return tensor is not None and tensor.size == size and not _is_normalized(other)
    return False


def _is_normalized(value: ir.Value | None) -> bool:
    """Whether `value` is normalized, so that a factor of it is a norm's weight."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _CARRIERS:
        value = node.inputs[0]
        node = None if value is None else value.producer()
    if node is None or node.op_type.endswith("Normalization"):
        return node is not None
    sizes = (source.producer() for source in node.inputs if source is not None)
    return node.op_type in _SCALES and any(s is not None and s.op_type in _OF_SIZE for s in sizes)


def _is_constant(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is not None
    )

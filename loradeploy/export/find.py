"""Which linear layers a graph has, and which modules of the checkpoint they are.

Evidence, the strongest first: the module paths that torch.onnx writes into a node's metadata, then
node names that spell a path, as the onnxruntime-genai builder and torch's older exporter give them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loradeploy.bundle.manifest import LoraTarget
from loradeploy.bundle.names import LOGITS, lora_a_name, lora_b_name
from loradeploy.errors import ExportError
from loradeploy.export.tidy import NAME_SCOPES, module_path

if TYPE_CHECKING:
    import onnx_ir as ir

# Heads that adapters replace whole, by the names that PEFT looks for in classifiers.
HEAD_NAMES: Final = ("classifier", "score")

_QUANTISED: Final = "MatMulNBits"
# What a weight may pass through on its way from its initializer to the product.
_CARRIERS: Final = ("Cast", "Identity")
# What may stand between the output head's product and the logits.
_AFTER_HEAD: Final = ("Add", "Cast", "Div", "Identity", "Mul", "Tanh")


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer in a graph: y = x W (+ b).

    `nodes`: its products, more than one where the module is called several times.
    `weight`: the initializer; it is [out, in] where `transposed`, else [in, out].
    `bias`: the initializer that is added to every product, where there is one.
    `found_by`: the evidence for `module`.
    `quantised`: the weight is packed, and cannot be read as numbers.
    """

    module: str
    nodes: tuple[ir.Node, ...]
    weight: ir.Value
    transposed: bool
    in_features: int
    out_features: int
    found_by: str
    bias: ir.Value | None = None
    quantised: bool = False

    def target(self) -> LoraTarget:
        """The layer as a manifest tells of it."""
        return LoraTarget(
            module=self.module,
            in_features=self.in_features,
            out_features=self.out_features,
            lora_A=lora_a_name(self.module),
            lora_B=lora_b_name(self.module),
            weight=str(self.weight.name),
            transposed=self.transposed,
            found_by=self.found_by,
        )


@dataclass(frozen=True, eq=False)
class Findings:
    """The linear layers by module, and the nodes that look like one and have no known module."""

    linears: Mapping[str, Linear]
    unidentified: tuple[str, ...] = field(default=())


@dataclass(frozen=True, eq=False)
class _Product:
    node: ir.Node
    weight: ir.Value
    transposed: bool
    in_features: int
    out_features: int
    quantised: bool = False


def find_linears(model: ir.Model) -> Findings:
    """Every product with a constant two-dimensional weight in the main graph, by its module."""
    grouped: dict[str, list[tuple[_Product, str]]] = {}
    unidentified = []
    for product in _products(model.graph):
        found = module_of(product.node)
        if found is None:
            unidentified.append(_describe(product))
        else:
            grouped.setdefault(found[0], []).append((product, found[1]))
    linears: dict[str, Linear] = {}
    for module, calls in grouped.items():
        first, found_by = calls[0]
        if any(other.weight is not first.weight for other, _ in calls[1:]):
            # One module with two weights: an attention written as bare products, say.
            unidentified += [_describe(product) for product, _ in calls]
            continue
        nodes = tuple(product.node for product, _ in calls)
        linears[module] = Linear(
            module=module,
            nodes=nodes,
            weight=first.weight,
            transposed=first.transposed,
            in_features=first.in_features,
            out_features=first.out_features,
            found_by=found_by,
            bias=None if (use := bias_use(nodes[0], first.out_features)) is None else value_of(use),
            quantised=first.quantised,
        )
    return Findings(linears, tuple(unidentified))


def output_head(model: ir.Model, findings: Findings) -> str | None:
    """The module whose product the graph's logits are."""
    producers = {node: module for module, lin in findings.linears.items() for node in lin.nodes}
    value = next((output for output in model.graph.outputs if output.name == LOGITS), None)
    while value is not None and (node := value.producer()) is not None:
        if node in producers:
            return producers[node]
        if node.op_type not in _AFTER_HEAD:
            return None
        value = next((v for v in node.inputs if v is not None and not v.is_initializer()), None)
    return None


def is_head(module: str) -> bool:
    """Whether `module` is a classifier's head, or a part of one.

    As in PEFT 0.21 a name counts that ends so: DistilBERT's `pre_classifier` is a part too.
    """
    return any(part.endswith(HEAD_NAMES) for part in module.split("."))


def refuse_side_inputs(model: ir.Model) -> None:
    """Raise ExportError where the graph already has side inputs but no manifest that tells them."""
    taken = [
        v.name for v in model.graph.inputs if v.name and v.name.endswith((".lora_A", ".lora_B"))
    ]
    if taken:
        raise ExportError(
            f"the graph already takes the side input {taken[0]}: give the bundle's directory, with"
            " its manifest, or the graph it was made from"
        )


def _products(graph: ir.Graph) -> Iterator[_Product]:
    for node in graph:
        if node.op_type in ("MatMul", "Gemm") and node.domain == "":
            product = _float_product(node)
        elif node.op_type == _QUANTISED:
            product = _packed_product(node)
        else:
            continue
        if product is not None:
            yield product


def _float_product(node: ir.Node) -> _Product | None:
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or weight.is_graph_input():
        return None
    turned = False
    if node.op_type == "Gemm":
        turned = _integer(node, "transB")
        # Other scales and a transposed x are no linear layer as adapters know it.
        if _integer(node, "transA") or _number(node, "alpha") != 1 or _number(node, "beta") != 1:
            return None
    while (carrier := weight.producer()) is not None:
        if carrier.op_type == "Transpose" and _swaps(carrier):
            turned = not turned
        elif carrier.op_type not in _CARRIERS:
            return None
        source = carrier.inputs[0]
        if source is None:
            return None
        weight = source
    if not weight.is_initializer() or weight.is_graph_input() or weight.const_value is None:
        return None
    shape = weight.const_value.shape.numpy()
    if len(shape) != 2 or not weight.const_value.dtype.is_floating_point():
        return None
    rows, columns = shape
    into, out = (columns, rows) if turned else (rows, columns)
    return _Product(node, weight, bool(turned), into, out)


def _packed_product(node: ir.Node) -> _Product | None:
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer():
        return None
    into, out = node.attributes["K"].as_int(), node.attributes["N"].as_int()
    return _Product(node, weight, True, into, out, quantised=True)


def module_of(node: ir.Node) -> tuple[str, str] | None:
    """The path of the module that a node is of, and by what it was found."""
    path = module_path(node)
    if path is not None:
        return path, f"metadata {NAME_SCOPES}"
    name = node.name or ""
    if name.startswith("/") and name.count("/") > 1:
        return name.strip("/").rsplit("/", 1)[0].replace("/", "."), "node name"
    return None


def bias_use(node: ir.Node, size: int) -> tuple[ir.Node, int] | None:
    """Where the constant [size] that is added to the product `node` is used: a node's input."""
    if node.op_type == "Gemm":
        adder, indices = node, range(2, len(node.inputs))
    else:
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != "Add":
            return None
        adder = uses[0].node
        indices = range(len(adder.inputs))
    for index in indices:
        value = adder.inputs[index]
        if value is None or not value.is_initializer() or value.const_value is None:
            continue
        if tuple(value.const_value.shape.numpy()) == (size,):
            return adder, index
    return None


def value_of(use: tuple[ir.Node, int]) -> ir.Value | None:
    """The value at a node's input."""
    node, index = use
    return node.inputs[index]


def _describe(product: _Product) -> str:
    node = product.node
    return f"{node.name or node.outputs[0].name} [{product.in_features} → {product.out_features}]"


def _integer(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())


def _number(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else float(attribute.as_float())


def _swaps(node: ir.Node) -> bool:
    attribute = node.attributes.get("perm")
    return attribute is None or tuple(attribute.as_ints()) == (1, 0)

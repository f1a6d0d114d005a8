"""Find the linear layers of a graph by module of the checkpoint.

products.py finds products, naming.py identifies their modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loradeploy.adapter.tasks import CLASSIFIER_HEADS, QA_HEADS
from loradeploy.bundle.manifest import LoraTarget
from loradeploy.bundle.names import lora_a_name, lora_b_name
from loradeploy.bundle.outputs import LOGITS_NAMES
from loradeploy.errors import ExportError
from loradeploy.export.graph.scopes import linear_scopes
from loradeploy.export.match.modules.naming import FUSED_MODULES, Named, Namer, by_graph
from loradeploy.export.match.products import Product, bias_use, describe, products, value_of

if TYPE_CHECKING:
    import onnx_ir as ir

# Operators that may be between the product of the output head and the logits.
_AFTER_HEAD: Final = (
    *("Add", "Cast", "DequantizeLinear", "Div", "Identity", "Mul", "QuantizeLinear", "Tanh"),
)


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer in a graph: y = x W (+ b).

    `nodes`: its products, several if the module is called several times.
    `weight`: the initializer, [out, in] if `transposed`, else [in, out].
    `bias`: the initializer that is added to every product, if any.
    `found_by`: the evidence for `module`.
    `quantized`: the weight is quantized, and cannot be replaced by float values.
    `slice`: the module's range of outputs in a fused product; `weight`, and a `bias` that is added
    to the full product, are then those of all modules.
    `unseen_bias`: the checkpoint has a bias for the module that was not found in the graph.
    """

    module: str
    nodes: tuple[ir.Node, ...]
    weight: ir.Value
    transposed: bool
    in_features: int
    out_features: int
    found_by: str
    bias: ir.Value | None = None
    quantized: bool = False
    slice: tuple[int, int] | None = None
    unseen_bias: bool = False

    def target(self) -> LoraTarget:
        """The layer as a target of the manifest."""
        return LoraTarget(
            module=self.module,
            in_features=self.in_features,
            out_features=self.out_features,
            lora_A=lora_a_name(self.module),
            lora_B=lora_b_name(self.module),
            weight=str(self.weight.name),
            transposed=self.transposed,
            found_by=self.found_by,
            slice=self.slice,
        )


@dataclass(frozen=True, eq=False)
class Findings:
    """The linear layers by module, and the products whose module is not known."""

    linears: Mapping[str, Linear]
    unidentified: tuple[str, ...]


def find_linears(model: ir.Model, namer: Namer = by_graph) -> Findings:
    """Find every product with a constant two-dimensional weight in the main graph, by module."""
    grouped: dict[tuple[tuple[str, int], ...], list[tuple[Product, Named]]] = {}
    unidentified = []
    for product in products(model.graph):
        named = namer(product)
        if named is None:
            unidentified.append(describe(product))
        else:
            grouped.setdefault(named.modules, []).append((product, named))
    linears: dict[str, Linear] = {}
    for modules, calls in grouped.items():
        first, named = calls[0]
        taken = any(module in linears for module, _ in modules)
        if taken or any(other.weight is not first.weight for other, _ in calls[1:]):
            # One module with two weights, such as an attention written as bare products.
            unidentified += [describe(product) for product, _ in calls]
            continue
        for linear in _linears(calls[0][0], tuple(product.node for product, _ in calls), named):
            linears[linear.module] = linear
    return Findings(linears, tuple(unidentified))


def _linears(product: Product, nodes: tuple[ir.Node, ...], named: Named) -> list[Linear]:
    """The modules of one product."""
    use = bias_use(nodes[0], product.out_features)
    found: list[Linear] = []
    begin = 0
    for module, outputs in named.modules:
        found.append(
            Linear(
                module=module,
                nodes=nodes,
                weight=product.weight,
                transposed=product.transposed,
                in_features=product.in_features,
                out_features=outputs,
                found_by=named.found_by,
                bias=None if use is None else value_of(use),
                quantized=product.quantized,
                slice=None if len(named.modules) == 1 else (begin, begin + outputs),
                unseen_bias=module in named.unseen_biases,
            )
        )
        begin += outputs
    return found


def annotate_modules(linears: Mapping[str, Linear]) -> None:
    """Write the modules into the nodes' metadata, for a later export of the graph."""
    for linear in linears.values():
        packed = [other for other in linears.values() if other.nodes[0] is linear.nodes[0]]
        for node in linear.nodes:
            if linear.slice is None:
                node.metadata_props.update(linear_scopes(linear.module))
            else:
                modules = [[other.module, other.out_features] for other in packed]
                node.metadata_props[FUSED_MODULES] = json.dumps(modules)


def output_head(model: ir.Model, findings: Findings) -> str | None:
    """The module whose product gives the graph's logits; None if it is not known."""
    producers = {node: module for module, lin in findings.linears.items() for node in lin.nodes}
    value = next((output for output in model.graph.outputs if output.name in LOGITS_NAMES), None)
    while value is not None and (node := value.producer()) is not None:
        if node in producers:
            return producers[node]
        if node.op_type not in _AFTER_HEAD:
            return None
        value = next((v for v in node.inputs if v is not None and not v.is_initializer()), None)
    return None


def is_head(module: str) -> bool:
    """Whether `module` is the head of a classifier or for question answering, or a part of one.

    As in PEFT 0.21, names are compared by their ends: DistilBERT's `pre_classifier` counts too.
    """
    return any(part.endswith((*CLASSIFIER_HEADS, *QA_HEADS)) for part in module.split("."))


def refuse_side_inputs(model: ir.Model) -> None:
    """Raise ExportError if the graph already has side inputs, which need a manifest."""
    taken = [
        v.name for v in model.graph.inputs if v.name and v.name.endswith((".lora_A", ".lora_B"))
    ]
    if taken:
        raise ExportError(
            f"the graph already takes the side input {taken[0]}: give the bundle's directory, with"
            " its manifest, or the graph it was made from"
        )

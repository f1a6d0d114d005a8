"""Find the products of a mixture's experts by parameter.

A traced graph computes all experts in one product, [1 or experts, tokens, in] times the constant
[experts, in, out]. The parameter of a constant is found by its values while the checkpoint is
available, and written into the metadata of the product, which bundles keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.manifest import LoraTarget
from loradeploy.bundle.names import lora_a_name, lora_b_name
from loradeploy.export.graph.edit import constant_of
from loradeploy.export.match.modules.naming import module_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_PARAMETER: Final = "loradeploy.experts"
_RANK: Final = 3


@dataclass(frozen=True, eq=False)
class Experts:
    """The product of all experts with one parameter.

    `node`: a MatMul of x [1 or experts, tokens, in] and `weight`, the initializer [experts, in,
    out]. `parameter`: its name in the checkpoint.
    """

    parameter: str
    node: ir.Node
    weight: ir.Value

    @property
    def shape(self) -> tuple[int, int, int]:
        """The weight's shape, [experts, in, out]."""
        experts, into, out = constant_of(self.weight).shape
        return experts, into, out

    def target(self) -> LoraTarget:
        """The parameter as a target of the manifest."""
        experts, into, out = self.shape
        return LoraTarget(
            module=self.parameter,
            in_features=into,
            out_features=out,
            lora_A=lora_a_name(self.parameter),
            lora_B=lora_b_name(self.parameter),
            weight=str(self.weight.name),
            transposed=False,
            found_by="values of the weight",
            kind="experts",
            experts=experts,
        )


def annotate_experts(model: ir.Model, parameters: Mapping[str, NDArray[Any]]) -> None:
    """Write the parameter of each product of experts into its metadata.

    `parameters`: the model's parameters of experts, with three dimensions.
    """
    for node, weight in _products(model):
        values, found = constant_of(weight), module_of(node)
        names = [
            name
            for name, own in parameters.items()
            if found is not None
            and name.rpartition(".")[0] == found[0]
            and (np.array_equal(own, values) or np.array_equal(own.swapaxes(1, 2), values))
        ]
        if len(names) == 1:
            node.metadata_props[_PARAMETER] = names[0]


def find_experts(model: ir.Model) -> dict[str, Experts]:
    """The products of experts whose parameter is known, by parameter."""
    found: dict[str, Experts] = {}
    twice = set()
    for node, weight in _products(model):
        name = node.metadata_props.get(_PARAMETER)
        if name is None:
            continue
        if name in found:
            twice.add(name)
        found[name] = Experts(name, node, weight)
    return {name: experts for name, experts in found.items() if name not in twice}


def _products(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" and not node.domain else None
        if weight is None or not weight.is_initializer() or weight.is_graph_input():
            continue
        tensor = weight.const_value
        if tensor is not None and len(tensor.shape) == _RANK and tensor.dtype.is_floating_point():
            yield node, weight

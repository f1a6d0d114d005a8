"""Find embeddings, convolutions and norms of a graph by module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from loradeploy.bundle.manifest import LoraTarget
from loradeploy.bundle.names import INPUT_IDS, lora_a_name, lora_b_name
from loradeploy.export.graph.edit import is_fixed, source_of
from loradeploy.export.match.modules.naming import module_of
from loradeploy.export.match.operators import MICROSOFT

if TYPE_CHECKING:
    import onnx_ir as ir

PartKind = Literal["embedding", "conv2d", "norm"]


@dataclass(frozen=True)
class _Operator:
    """The kind of an operator, and the indices of its weight and bias inputs."""

    kind: PartKind
    weight: int
    bias: int | None
    rank: int  # of the weight
    domain: str = ""


_OPERATORS: Final[Mapping[str, _Operator]] = {
    "Gather": _Operator("embedding", 0, None, 2),
    "Conv": _Operator("conv2d", 1, 2, 4),
    "LayerNormalization": _Operator("norm", 1, 2, 1),
    "RMSNormalization": _Operator("norm", 1, None, 1),
    "GroupNormalization": _Operator("norm", 1, 2, 1),
    "BatchNormalization": _Operator("norm", 1, 2, 1),
    "SimplifiedLayerNormalization": _Operator("norm", 1, None, 1),
    "SkipLayerNormalization": _Operator("norm", 2, 3, 1, MICROSOFT),
    "SkipSimplifiedLayerNormalization": _Operator("norm", 2, None, 1, MICROSOFT),
}


# Operators between the ids and the embedding.
_ID_CARRIERS: Final = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True, eq=False)
class Part:
    """A layer with a constant weight.

    `nodes`: its calls. `weight`: an initializer, their input number `weight_input`: [vocabulary,
    size], [out, in, height, width] or [size]. `bias_input`: the index of the bias input, None
    if they take none. `found_by`: the evidence for `module`.
    """

    module: str
    kind: PartKind
    nodes: tuple[ir.Node, ...]
    weight: ir.Value
    weight_input: int
    bias_input: int | None
    found_by: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        assert self.weight.const_value is not None
        return tuple(int(size) for size in self.weight.const_value.shape.numpy())

    @property
    def bias(self) -> ir.Value | None:
        """The bias, or None."""
        inputs = self.nodes[0].inputs
        if self.bias_input is None or len(inputs) <= self.bias_input:
            return None
        return inputs[self.bias_input]

    @property
    def outputs(self) -> int:
        """The size of its bias."""
        return self.shape[-1] if self.kind == "embedding" else self.shape[0]

    def target(self) -> LoraTarget | None:
        """The layer as a target of the manifest; None if it takes no factors."""
        if self.kind == "norm":
            return None
        embeds = self.kind == "embedding"
        return LoraTarget(
            module=self.module,
            in_features=self.shape[0] if embeds else math.prod(self.shape[1:]),
            out_features=self.outputs,
            lora_A=lora_a_name(self.module),
            lora_B=lora_b_name(self.module),
            weight=str(self.weight.name),
            transposed=not embeds,
            found_by=self.found_by,
            kind=self.kind,
        )


def find_parts(model: ir.Model) -> dict[str, Part]:
    """Every embedding, convolution and norm with a constant weight, by module."""
    parts: dict[str, Part] = {}
    calls: dict[str, list[ir.Node]] = {}
    ambiguous = set()
    for node, operator, weight in _weighted(model):
        if (found := module_of(node)) is None:
            continue
        module, found_by = found
        first = parts.get(module)
        if first is not None and first.weight is not weight:
            ambiguous.add(module)  # a module with two weights is not a layer
            continue
        calls.setdefault(module, []).append(node)
        parts[module] = Part(
            module=module,
            kind=operator.kind,
            nodes=tuple(calls[module]),
            weight=weight,
            weight_input=operator.weight,
            bias_input=operator.bias,
            found_by=found_by,
        )
    return {module: part for module, part in parts.items() if module not in ambiguous}


def weights_of_parts(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Every call of an embedding, convolution or norm, also without a module, and its weight."""
    for node, _, weight in _weighted(model):
        yield node, weight


def _weighted(model: ir.Model) -> Iterator[tuple[ir.Node, _Operator, ir.Value]]:
    for node in model.graph:
        operator = _OPERATORS.get(node.op_type)
        weight = None if operator is None else _weight(node, operator)
        if operator is not None and weight is not None:
            yield node, operator, weight


def embedding_of(model: ir.Model) -> Part | None:
    """The embedding of `input_ids`, if it is known."""
    for part in find_parts(model).values():
        ids = source_of(part.nodes[0].inputs[1], _ID_CARRIERS) if part.kind == "embedding" else None
        if ids is not None and ids.name == INPUT_IDS:
            return part
    return None


def _weight(node: ir.Node, operator: _Operator) -> ir.Value | None:
    """The constant weight of `node`, or None if it has none of the expected rank.

    Operators of other domains store it in another order; tables that are read by columns do not
    count.
    """
    axis = node.attributes.get("axis")
    transposed = node.op_type == "Gather" and axis is not None and axis.as_int() % 2
    if node.domain != operator.domain or transposed:
        return None
    value = node.inputs[operator.weight] if len(node.inputs) > operator.weight else None
    tensor = value.const_value if is_fixed(value) else None
    if tensor is None or not tensor.dtype.is_floating_point():
        return None
    return value if len(tensor.shape) == operator.rank else None

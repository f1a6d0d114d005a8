"""The reference for quantized weights: PyTorch with the numbers that the graph has, dequantized.

What rounding to 8 or 4 bits does to the model is the choice of whoever quantized it; parity asks
whether the weights are the base's but for that rounding, and whether the deployment computes what
they say, adapters on top. What is left between the two is the activations, which onnxruntime rounds
to 8 bits where it multiplies quantized weights.

A merged graph packs base and adapter in one. There the reference is the merge in PyTorch, rounded
as loradeploy's own export rounds: nothing of the graph is in it but how many bits it packs to. Of a
base that was quantized before the merge, both roundings are taken from the graph (requantized.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loradeploy.errors import BundleError
from loradeploy.parity.reference.rounding import Activations
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest
    from loradeploy.export.match.products import Product

logger = logger_of(__name__)

QUANTIZED: Final = ("int8", "int4")
# What rounding may change of a row of a weight, ‖difference‖ / ‖row‖. With s steps to each side of
# zero, normal numbers in blocks of 32 lose 0.6 / s: 0.5 % and 9 %; outliers make it more.
_MOST_OFF: Final = {"int8": 0.05, "int4": 0.3}
# Rows smaller than this share of the usual one are taken for as large.
_SMALL_ROW: Final = 0.1
# onnxruntime's accuracy_level of products that round what they multiply to int8.
_INT8_ACTIVATIONS: Final = 4


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized weight of a graph: its numbers [out, in] dequantized, its bits, and its blocks.

    Of several modules that share a product, all have the numbers of the whole.

    `activations`: how the product rounds what it multiplies; None where it does not.
    `rounding`: what rounding did to a merged weight, [out, in], where that is read from the graph.
    """

    values: NDArray[np.float32]
    bits: int
    block: int
    activations: Activations | None
    rounding: NDArray[np.float32] | None = None


def quantized_weights(bundle: Path, manifest: Manifest) -> Mapping[str, QuantizedWeight]:
    """The quantized weights of the bundle's graph, by module.

    Raises:
        BundleError: a weight is quantized in a way that is not understood.
    """
    from loradeploy.export.graph.halves import load_bundle_graph
    from loradeploy.export.graph.names import called_after
    from loradeploy.export.match.linears import find_linears
    from loradeploy.export.match.products import products
    from loradeploy.export.match.quantized import INTEGER
    from loradeploy.export.passes.side_inputs.inject import remove_side_inputs
    from loradeploy.export.passes.undo import remove_choices

    graph = load_bundle_graph(bundle, manifest)
    remove_choices(graph.graph, manifest)
    remove_side_inputs(graph, manifest)
    at = {product.node: product for product in products(graph.graph)}
    found: dict[str, QuantizedWeight] = {}
    for name, linear in find_linears(graph).linears.items():
        if not linear.quantized:
            continue
        product = at[linear.nodes[0]]
        begin, end = linear.slice or (0, linear.out_features)
        values = product.rows(list(range(begin, end)))
        # The integers of a MatMulInteger are scaled behind the product.
        if values is None or product.node.op_type == INTEGER:
            raise BundleError(
                f"{bundle}: parity cannot read the {product.node.op_type} weight of {name}: compare"
                " the graph with the PyTorch model instead (`reference`)"
            )
        weight = _quantized_weight(product, values)
        # A merged graph keeps q, k and v as one product; blocks are within a module's own rows.
        found |= dict.fromkeys(called_after(name), weight)
    return found


def dequantize_into(
    model: torch.nn.Module, weights: Mapping[str, QuantizedWeight], manifest: Manifest
) -> None:
    """Give the linear layers of `model` a graph's quantized weights.

    Raises:
        BundleError: a weight is not that of the base but for its rounding.
    """
    most = _MOST_OFF[manifest.precision]
    for name, module in layers_of(model, weights):
        weight = _like(module, weights[name].values)
        own = module.weight.detach()
        off = _off(_like(module, weight.numpy()), _like(module, own.numpy()))
        if not off <= most:
            raise BundleError(
                f"the quantized weight of {name} is not the base's: a row is off by {off:.0%} of"
                f" its size, where {manifest.precision} leaves {most:.0%} at most: export again"
            )
        _give(module, weight)
    logger.info("took the quantized weights of the graph into the reference")


@contextmanager
def rounded_as(model: torch.nn.Module, weights: Mapping[str, QuantizedWeight]) -> Iterator[None]:
    """`model` with its weights as they are, merged or not, rounded as `weights` are."""
    from loradeploy.export.passes.precision.quantize import rounded

    kept = []
    try:
        for name, module in layers_of(model, weights):
            kept.append((module, module.weight))
            whole, quantized = weight_of(module), weights[name]
            if quantized.rounding is None:
                values = rounded(whole, quantized.bits, quantized.block)
            else:
                values = whole + quantized.rounding
            _give(module, _like(module, values))
        yield
    finally:
        for module, weight in kept:
            module.weight = weight


def activations_of(weights: Mapping[str, QuantizedWeight]) -> dict[str, Activations]:
    """How the products round what they multiply, by module, where they do."""
    return {name: w.activations for name, w in weights.items() if w.activations is not None}


def weight_of(module: Any) -> NDArray[np.float32]:
    """The weight [out, in] of a linear layer."""
    values: NDArray[np.float32] = _like(module, module.weight.detach().numpy()).numpy()
    return values


def _off(weight: torch.Tensor, own: torch.Tensor) -> float:
    """‖difference‖ / ‖own‖ of the row [in] that is off most; infinite where the shapes differ."""
    if weight.shape != own.shape:
        return math.inf
    size = own.norm(dim=1).clamp_min(own.norm() / len(own) ** 0.5 * _SMALL_ROW)
    return float(((weight - own).norm(dim=1) / size).max())


def layers_of(
    model: torch.nn.Module, weights: Mapping[str, QuantizedWeight]
) -> Iterator[tuple[str, Any]]:
    """The layers of `model` whose weights are quantized; of adapted ones, the base's."""
    modules: dict[str, Any] = dict(model.named_modules())
    for name in weights:
        if name in modules:
            yield name, getattr(modules[name], "base", modules[name])


def _like(module: Any, values: NDArray[np.float32]) -> torch.Tensor:
    """[out, in] as `module` holds it, and back: transformers' Conv1D holds weights turned."""
    import torch

    weight = torch.from_numpy(values)
    return weight.T.contiguous() if type(module).__name__ == "Conv1D" else weight


def _give(module: Any, weight: torch.Tensor) -> None:
    """A parameter of its own: an output head may be tied to embeddings, which are not quantized."""
    import torch

    module.weight = torch.nn.Parameter(weight, requires_grad=False)


def _quantized_weight(product: Product, values: NDArray[np.float32]) -> QuantizedWeight:
    given = product.node.attributes
    if product.node.op_type != "MatMulNBits":
        return QuantizedWeight(values, 8, values.shape[1], Activations(None))
    bits = given["bits"].as_int() if "bits" in given else 4
    block, level = given["block_size"].as_int(), given.get("accuracy_level")
    rounds = level is not None and level.as_int() == _INT8_ACTIVATIONS
    return QuantizedWeight(values, bits, block, Activations(block) if rounds else None)

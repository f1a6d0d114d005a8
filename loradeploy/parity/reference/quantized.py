"""The reference for quantized weights: PyTorch with the dequantized weights of the graph.

The effect of rounding weights to 8 or 4 bits is the decision of whoever quantizes a model. Parity
checks that the weights are the base's apart from that rounding, and that the deployment computes
the same as PyTorch with these weights and with adapters. The remaining difference is in the
activations, which onnxruntime rounds to 8 bits where it multiplies quantized weights.

A merged graph has base and adapter in the same weights. Its reference is the merge in PyTorch,
rounded as loradeploy's export rounds it; only the number of bits and the block size are taken from
the graph. If the base was quantized before the merge, the errors of both roundings are taken from
the graph (requantized.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.errors import BundleError
from loradeploy.parity.reference.rounding import Activations
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest
    from loradeploy.export.match.products import Product

logger = logger_of(__name__)

QUANTIZED: Final = ("int8", "int4")
# The largest relative error of a weight's row by rounding, ‖difference‖ / ‖row‖. With s steps to
# each side of zero, normal numbers in blocks of 32 have 0.6 / s: 0.5 % and 9 %; outliers more.
_MOST_OFF: Final = {"int8": 0.05, "int4": 0.3}
# The largest error of one value that loradeploy quantized, in steps of its block: rounding leaves
# half a step, and a whole one at the end of the range; a 16-bit type in between adds a part.
_MOST_STEPS: Final = 1.5
# Rows smaller than this share of the RMS row size are treated as if they had that size.
_SMALL_ROW: Final = 0.1
# onnxruntime's accuracy_level of products that round their activations to int8.
_INT8_ACTIVATIONS: Final = 4


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized weight of a graph.

    `values`: the dequantized weight [out, in], or [vocabulary, size] of an embedding; modules that
    share a product all have the values of the whole product. `bits`, `block`: bits and block size
    of the quantization.
    `activations`: how the product rounds its activations; None if it does not.
    `rounding`: the rounding error of a merged weight, [out, in], if it is read from the graph.
    """

    values: NDArray[np.float32]
    bits: int
    block: int
    activations: Activations | None
    rounding: NDArray[np.float32] | None = None


def quantized_weights(bundle: Path, manifest: Manifest) -> Mapping[str, QuantizedWeight]:
    """Return the quantized weights of the bundle's graph, by module; of embeddings [tokens, size].

    Raises:
        BundleError: a weight is quantized in an unsupported way.
    """
    from loradeploy.export.graph.halves import load_bundle_graph
    from loradeploy.export.graph.names import modules_of_label
    from loradeploy.export.match.linears import find_linears
    from loradeploy.export.match.products import products
    from loradeploy.export.match.quantized import INTEGER
    from loradeploy.export.passes.precision.embedding import BITS, packed_embedding
    from loradeploy.export.passes.side_inputs.inject import remove_side_inputs
    from loradeploy.export.passes.undo import remove_choices

    graph = load_bundle_graph(bundle, manifest)
    remove_choices(graph, manifest)
    remove_side_inputs(graph, manifest)
    at = {product.node: product for product in products(graph.graph)}
    found: dict[str, QuantizedWeight] = {}
    for name, linear in find_linears(graph).linears.items():
        if not linear.quantized:
            continue
        product = at[linear.nodes[0]]
        begin, end = linear.slice or (0, linear.out_features)
        values = product.rows(list(range(begin, end)))
        # The scale of a MatMulInteger is applied after the product.
        if values is None or product.node.op_type == INTEGER:
            raise BundleError(
                f"{bundle}: parity cannot read the {product.node.op_type} weight of {name}: compare"
                " the graph with the PyTorch model instead (`reference`)"
            )
        weight = _quantized_weight(product, values)
        # A merged graph may have q, k and v in one product; no block spans two modules.
        found |= dict.fromkeys(modules_of_label(name), weight)
    if (module := manifest.quantized_embedding) is not None:
        if (embedding := packed_embedding(graph, module)) is None:
            raise BundleError(
                f"{bundle}: the graph has no quantized {module}, which the manifest names: export"
                " again"
            )
        found[module] = QuantizedWeight(embedding.values, BITS, embedding.block, None)
    return found


def dequantize_into(
    model: torch.nn.Module, weights: Mapping[str, QuantizedWeight], manifest: Manifest
) -> None:
    """Replace weights of linear layers in `model` by the dequantized ones of a graph.

    Raises:
        BundleError: a weight differs from the base's by more than rounding.
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
        steps = _steps_off(weights[name], weight_of(module)) if manifest.traced else 0.0
        if not steps <= _MOST_STEPS:
            raise BundleError(
                f"the quantized weight of {name} is not the base's: a value is off by {steps:.1f}"
                f" steps of its block, where rounding leaves {_MOST_STEPS:g} at most: export again"
            )
        _give(module, weight)
    logger.info("took the quantized weights of the graph into the reference")


@contextmanager
def rounded_as(model: torch.nn.Module, weights: Mapping[str, QuantizedWeight]) -> Iterator[None]:
    """Round the current weights of `model`, merged or not, as `weights` are, in this block."""
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
    """Return how products round their activations, by module; only those that do."""
    return {name: w.activations for name, w in weights.items() if w.activations is not None}


def weight_of(module: Any) -> NDArray[np.float32]:
    """Return the weight [out, in] of a linear layer."""
    values: NDArray[np.float32] = _like(module, module.weight.detach().numpy()).numpy()
    return values


def _off(weight: torch.Tensor, own: torch.Tensor) -> float:
    """Return the largest ‖difference‖ / ‖own‖ of a row [in]; infinity if the shapes differ."""
    if weight.shape != own.shape:
        return math.inf
    size = own.norm(dim=1).clamp_min(own.norm() / len(own) ** 0.5 * _SMALL_ROW)
    return float(((weight - own).norm(dim=1) / size).max())


def _steps_off(quantized: QuantizedWeight, own: NDArray[np.float32]) -> float:
    """Return the largest difference of a value from `own` [out, in], in steps of its block."""
    block = quantized.block
    off, size = (np.abs(values) for values in (quantized.values - own, own))
    ends = range(0, own.shape[1], block)
    step = np.maximum.reduceat(size, ends, axis=1) / (2 ** (quantized.bits - 1) - 1)
    largest = np.maximum.reduceat(off, ends, axis=1)
    least = np.finfo(np.float32).tiny
    return float((largest / np.maximum(step, least)).max())


def layers_of(
    model: torch.nn.Module, weights: Mapping[str, QuantizedWeight]
) -> Iterator[tuple[str, Any]]:
    """Yield the layers of `model` whose weights are quantized; of adapted layers, the base's."""
    modules: dict[str, Any] = dict(model.named_modules())
    for name in weights:
        if name in modules:
            yield name, getattr(modules[name], "base", modules[name])


def _like(module: Any, values: NDArray[np.float32]) -> torch.Tensor:
    """Convert a weight between [out, in] and the layout of `module`: Conv1D has [in, out]."""
    import torch

    weight = torch.from_numpy(values)
    return weight.T.contiguous() if type(module).__name__ == "Conv1D" else weight


def _give(module: Any, weight: torch.Tensor) -> None:
    """Set the weight as a new parameter, since a head may be tied to unquantized embeddings."""
    import torch

    module.weight = torch.nn.Parameter(weight, requires_grad=False)


def _quantized_weight(product: Product, values: NDArray[np.float32]) -> QuantizedWeight:
    from loradeploy.export.match.quantized import MATMUL_NBITS, packed_bits

    node = product.node
    if node.op_type != MATMUL_NBITS:
        return QuantizedWeight(values, 8, values.shape[1], Activations(None))
    block, level = node.attributes["block_size"].as_int(), node.attributes.get("accuracy_level")
    rounds = level is not None and level.as_int() == _INT8_ACTIVATIONS
    return QuantizedWeight(values, packed_bits(node), block, Activations(block) if rounds else None)

"""The reference for packed weights: PyTorch with the numbers that the graph has, unpacked.

What rounding to 8 or 4 bits does to the model is the choice of whoever packed it; parity asks
whether the weights are the base's but for that rounding, and whether the deployment computes what
they say, adapters on top. What is left between the two is the activations, which onnxruntime rounds
to 8 bits where it multiplies packed weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.names import GRAPH_NAME
from loradeploy.errors import BundleError, UsageError
from loradeploy.parity.rounding import Activations

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from loradeploy.bundle.manifest import Manifest
    from loradeploy.export.products import Product

logger = logging.getLogger(__name__)

PACKED: Final = ("int8", "int4")
# What rounding may change of a weight, ‖difference‖ / ‖weight‖. With s steps to each side of zero,
# normal numbers in blocks of 32 lose 0.6 / s: 0.5 % and 9 %; outliers make it more.
_MOST_OFF: Final = {"int8": 0.05, "int4": 0.3}
# onnxruntime's accuracy_level of products that round what they multiply to int8.
_INT8_ACTIVATIONS: Final = 4


def check_packed(manifest: Manifest) -> None:
    """Raise UsageError for a merged bundle: its packed weights hold base and adapter in one."""
    if manifest.precision in PACKED and manifest.mode == "merged":
        raise UsageError(
            f"the weights of a merged {manifest.precision} bundle hold base and adapter in one, so"
            " that PyTorch has nothing to hold against them: prove the fp32 merge, or side inputs"
        )


def unpack_into(
    model: torch.nn.Module, bundle: Path, manifest: Manifest
) -> Mapping[str, Activations]:
    """Give the linear layers of `model` the packed weights of the bundle's graph.

    Returns the modules whose inputs the graph rounds.

    Raises:
        BundleError: a weight is packed in a way that is not understood, or is not the base's.
    """
    import torch

    from loradeploy.export.branches import remove_branches
    from loradeploy.export.find import find_linears
    from loradeploy.export.graph import load_graph
    from loradeploy.export.products import products
    from loradeploy.export.side_inputs import remove_side_inputs

    graph = load_graph(bundle / GRAPH_NAME)
    if manifest.branches:
        remove_branches(graph.graph)
    remove_side_inputs(graph, manifest)
    at = {product.node: product for product in products(graph.graph)}
    modules: dict[str, Any] = dict(model.named_modules())
    rounding: dict[str, Activations] = {}
    for name, linear in find_linears(graph).linears.items():
        module = modules.get(name)
        if not linear.quantised or module is None:
            continue
        product = at[linear.nodes[0]]
        begin, end = linear.slice or (0, linear.out_features)
        rows = product.rows(list(range(begin, end)))
        weight = None if rows is None else torch.from_numpy(rows)
        if weight is not None and type(module).__name__ == "Conv1D":
            weight = weight.T.contiguous()
        if weight is None or weight.shape != module.weight.shape:
            raise BundleError(f"{bundle}: the packed weight of {name} cannot be read")
        own, most = module.weight.detach(), _MOST_OFF[manifest.precision]
        off = float((weight - own).norm() / own.norm())
        if not off <= most:
            raise BundleError(
                f"{bundle}: the packed weight of {name} is not the base's: it is off by {off:.0%}"
                f" of its size, where {manifest.precision} leaves {most:.0%} at most: export again"
            )
        # A parameter of its own: an output head may be tied to embeddings, which are not packed.
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        if (activations := _activations(product)) is not None:
            rounding[name] = activations
    logger.info("took the packed weights of the graph into the reference")
    return rounding


def _activations(product: Product) -> Activations | None:
    """How onnxruntime rounds what this product multiplies; None where it does not."""
    if product.node.op_type != "MatMulNBits":
        return Activations(None)
    level = product.node.attributes.get("accuracy_level")
    if level is None or level.as_int() != _INT8_ACTIVATIONS:
        return None
    return Activations(product.node.attributes["block_size"].as_int())

"""ONNX's reference evaluator as a backend: the standard's operators in numpy."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.names import GRAPH_NAME
from loradeploy.errors import first_line
from loradeploy.parity.backends.onnx_model import Feeds, NotRunError, OnnxModel
from loradeploy.parity.context import CheckContext

if TYPE_CHECKING:
    import onnx

# Limits of nodes × parameters: to run at all, and to run without being requested. MiniLM (6 layers,
# 22 million parameters) is below the first and takes 7 s per adapter on one core; graphs below the
# second take less than a second.
_LARGEST: Final = 10**10
_QUICK: Final = 10**9
_STANDARD: Final = ("", "ai.onnx")


def lacks(context: CheckContext) -> str | None:
    """Return why the evaluator cannot run the bundle's graph; None if it may be able to."""
    if context.manifest.encoder is not None:
        return "it runs one graph, and an encoder-decoder has two"
    return _lacks(context, _LARGEST)


def is_quick(context: CheckContext) -> bool:
    """Whether the evaluator is installed and runs the bundle's graph in little time."""
    one = context.manifest.encoder is None
    return one and importlib.util.find_spec("onnx") is not None and _lacks(context, _QUICK) is None


def evaluator(context: CheckContext) -> Iterator[tuple[str | None, OnnxModel]]:
    """Yield the base, and each adapter as feeds; for a merged bundle, the graph itself.

    Raises:
        NotRunError: the evaluator does not have one of the graph's operators.
    """
    from onnx.reference import ReferenceEvaluator

    from loradeploy.bundle.adapter_inputs.base import BundleBase
    from loradeploy.bundle.adapter_inputs.factors import branch_choice, side_inputs

    graph = context.bundle / GRAPH_NAME
    try:
        made = ReferenceEvaluator(os.fspath(graph), new_ops=[_gather_elements()])
    except Exception as problem:  # several exception classes, all for a missing operator
        raise NotRunError(f"the evaluator cannot run the graph: {first_line(problem)}") from None
    manifest, known = context.manifest, context.cases.known
    if context.merged:
        for tested in context.adapters:
            yield tested.name, OnnxModel(manifest, partial(_evaluate, made, {}), known=known)
        return
    yield None, OnnxModel(manifest, partial(_evaluate, made, {}), known=known)
    base = BundleBase(context.bundle, manifest)
    for tested in context.adapters:
        side = side_inputs(tested.adapter, manifest, base) | branch_choice(manifest)
        yield tested.name, OnnxModel(manifest, partial(_evaluate, made, side), known=known)


def _gather_elements() -> type:
    """Return a full GatherElements: onnx 1.23's refuses axis -1 and axes longer than 32."""
    import numpy as np
    from onnx.reference.op_run import OpRun

    class GatherElements(OpRun):
        op_domain = ""

        def _run(self, data: Any, indices: Any, axis: int | None = None) -> tuple[Any]:
            return (np.take_along_axis(data, indices.astype(np.int64), axis=axis or 0),)

    return GatherElements


def _evaluate(
    made: Any, side: Feeds, outputs: Sequence[str], feeds: Feeds, adapters: object
) -> Sequence[Any]:
    values: Sequence[Any] = made.run(list(outputs), {**feeds, **side})
    return values


def _lacks(context: CheckContext, largest: int) -> str | None:
    import onnx

    model = onnx.load(os.fspath(context.bundle / GRAPH_NAME), load_external_data=False)
    functions = {(function.domain, function.name) for function in model.functions}
    nodes = parameters = 0
    for part in _graphs(model.graph):
        nodes += len(part.node)
        parameters += sum(prod(tensor.dims) for tensor in part.initializer)
        for node in part.node:
            known = node.domain in _STANDARD or (node.domain, node.op_type) in functions
            if not known:
                return f"{node.domain}.{node.op_type} is not an operator of the ONNX standard"
    if nodes * parameters <= largest:
        return None
    return f"the graph is too large for it ({nodes} nodes, {parameters / 1e6:.0f} M parameters)"


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graph and its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)

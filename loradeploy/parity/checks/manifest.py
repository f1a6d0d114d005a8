"""Whether the manifest describes the graph, where the numbers do not show it.

precision   that of the graph's weights, which decides the limits of the numbers
padding     the side on which rows are padded, as an export measures it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import ENCODER_NAME, GRAPH_NAME, NO_PADDING
from loradeploy.bundle.sample import Sample
from loradeploy.errors import ExportError, first_line
from loradeploy.export.graph.running import NotRunError
from loradeploy.export.match.products import precision_of
from loradeploy.export.read.values.cache import padding_of
from loradeploy.export.trial.opened import Trial
from loradeploy.export.trial.padding import padding_by_trial

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.parity.context import CheckContext


def differing_manifest(context: CheckContext) -> Iterator[tuple[str, str]]:
    """Yield the aspect and a message for each field that is not that of the graph."""
    import onnx_ir as ir

    names = [GRAPH_NAME] if context.manifest.encoder is None else [GRAPH_NAME, ENCODER_NAME]
    graphs = []
    for name in names:
        try:
            graphs.append(ir.load(context.bundle / name))
        except Exception as problem:  # onnx_ir raises anything for a damaged file
            yield "precision", f"{name} cannot be read: {first_line(problem)}"
            return
    found = (_precision(context, graphs), _padding(context, graphs[0]))
    for aspect, message in zip(("precision", "padding"), found, strict=True):
        if message is not None:
            yield aspect, f"{message}: export again"


def _precision(context: CheckContext, graphs: list[ir.Model]) -> str | None:
    """The two graphs of an encoder-decoder may differ: it is that of one of them."""
    stated = context.manifest.precision
    found = [precision_of(graph) for graph in graphs]
    if stated in found:
        return None
    return f"the manifest's precision is {stated}, and {GRAPH_NAME} has weights in {found[0]}"


def _padding(context: CheckContext, graph: ir.Model) -> str | None:
    """Measured only if it is not the usual side of such a graph: the phases run the stated one."""
    manifest = context.manifest
    if manifest.task != CAUSAL_LM and manifest.padding != NO_PADDING:
        return None  # of an encoder's rows, the right side is padded
    usual = padding_of(graph)
    if manifest.task == CAUSAL_LM and manifest.padding == usual:
        return None
    config = model_config(context.bundle)
    sample = Sample(manifest.inputs, config, pad=context.cases.pad)
    try:
        trial = Trial(context.bundle, dataclasses.replace(manifest, padding=usual))
        measured = padding_by_trial(trial, sample, context.cases.pad)
    except (ExportError, NotRunError):
        return None
    if measured in (None, manifest.padding):
        return None
    return f"the manifest's padding is {manifest.padding}, and {GRAPH_NAME} is padded {measured}"

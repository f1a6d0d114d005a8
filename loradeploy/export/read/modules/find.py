"""Identify the modules of graphs of other exporters by all evidence."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loradeploy.errors import ExportError, listed, listed_names
from loradeploy.export.match.linears import Findings, annotate_modules, find_linears
from loradeploy.export.match.modules.identity import CheckpointWeights
from loradeploy.export.match.modules.mapping import ModuleMap
from loradeploy.export.match.modules.naming import Namer, by_graph, first_of, keeping_fused
from loradeploy.export.match.modules.wrappers import name_parts
from loradeploy.export.match.operators import unreached_layers
from loradeploy.export.match.whole.layouts import annotate_layouts
from loradeploy.export.read.files.settings import genai_settings, settings_beside
from loradeploy.export.read.modules.doubts import (
    called_elsewhere,
    called_with_other_weight,
    reordered,
    scaled,
    scaled_beside,
    scaled_by_module,
    without_doubtful,
)
from loradeploy.export.read.modules.folded import refuse_folded
from loradeploy.export.read.modules.reach import check_reached
from loradeploy.export.read.modules.row_order import without_rows_in_doubt
from loradeploy.export.read.products.normalize import SCALE
from loradeploy.lora.base.formats import check_unquantized
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.adapter.adapter import Adapter

logger = logger_of(__name__)

# Architectures whose checkpoints have a fused q, k, v weight, by onnxruntime-genai's names.
_FUSED_QKV: Final = ("phi3", "phi3small", "phi3v", "phimoe")
_LISTED: Final = 4


@dataclass(frozen=True)
class Evidence:
    """The user's evidence for the modules of a graph.

    `checkpoint`: the checkpoint that the graph was exported from. `map`: a file, see mapping.py.
    """

    checkpoint: Path | None = None
    map: str | os.PathLike[str] | None = None


def find_modules(
    model: ir.Model,
    directory: Path,
    evidence: Evidence,
    adapters: Iterable[Adapter],
    *,
    proven: bool = False,
) -> Findings:
    """Identify the linear layers of a graph by all evidence, and annotate the graph.

    `proven`: whether the graph's annotations were made by an export with the checkpoint.

    Raises:
        UsageError: an invalid map, or an entry of it that matches nothing.
        ModelError: the checkpoint does not exist.
        ExportError: the graph is of another checkpoint, or a layer that an adapter targets cannot
            take adapters.
    """
    adapters, graph = tuple(adapters), model.graph
    targeted = _modules_of(adapters)
    weights = _weights_of(evidence, targeted)
    findings = _identified(model, directory, evidence, weights, adapters)
    check_reached(graph, findings, adapters)
    elsewhere = called_elsewhere(graph, findings)
    findings = without_doubtful(findings, targeted, scaled_by_module)
    findings = without_doubtful(findings, targeted, elsewhere)
    twice = called_with_other_weight(graph, findings, targeted)
    findings = without_doubtful(findings, targeted, twice)
    if weights is not None:
        _check_weights(graph, findings, weights)
        for node in (node for linear in findings.linears.values() for node in linear.nodes):
            node.metadata_props.pop(SCALE, None)  # the comparison proved that its weight is W
        annotate_layouts(findings.linears, weights.conv1d)
        name_parts(model, findings.linears, weights.module_with)
        refuse_folded(model, targeted, weights)
        annotate_modules(findings.linears)
        return findings
    findings = without_doubtful(findings, targeted, scaled)
    if not proven:
        findings = without_doubtful(findings, targeted, scaled_beside)
        refuse_folded(model, targeted, None)
        findings = without_doubtful(findings, targeted, reordered)
        _warn_of_names(findings)
    annotate_modules(findings.linears)
    if proven:
        return findings
    model_type = settings_beside(directory, None).get("model_type")
    return without_rows_in_doubt(model, model_type, findings, adapters)


def _weights_of(evidence: Evidence, targeted: set[str]) -> CheckpointWeights | None:
    if evidence.checkpoint is None:
        return None
    check_unquantized(evidence.checkpoint)
    return CheckpointWeights(evidence.checkpoint, targeted)


def _identified(
    model: ir.Model,
    directory: Path,
    evidence: Evidence,
    weights: CheckpointWeights | None,
    adapters: Iterable[Adapter],
) -> Findings:
    """The layers that the map, the checkpoint or the graph's own names identify, in this order."""
    mapped = None if evidence.map is None else ModuleMap(evidence.map)
    namers: list[Namer] = [] if mapped is None else [mapped]
    if weights is not None:
        findings = find_linears(model, weights.namer(first_of([*namers, by_graph])))
    else:
        namers += [keeping_fused(_fused_projections(directory, adapters)), by_graph]
        findings = find_linears(model, first_of(namers))
    if mapped is not None:
        mapped.check_used()
    return findings


def _warn_of_names(findings: Findings) -> None:
    """Warn which evidence identified the layers, because no weights prove it."""
    found_by = Counter(linear.found_by for linear in findings.linears.values())
    for evidence, count in found_by.items():
        logger.warning(
            "identified by %s alone: %d layers. Weights that were scaled, reordered or merged have"
            " the same names: to prove them, give `checkpoint`, or compare the bundle with PyTorch"
            " (loradeploy parity --model)",
            evidence,
            count,
        )


def _fused_projections(directory: Path, adapters: Iterable[Adapter]) -> set[str]:
    """The fused projections that are modules of the checkpoint, as far as known."""
    targeted = {module for adapter in adapters for module in adapter.factors}
    fused = {module for module in targeted if module.endswith(".qkv_proj")}
    settings = genai_settings(directory)
    if settings.get("type") in _FUSED_QKV:
        layers = settings.get("decoder", {}).get("num_hidden_layers", 0)
        fused |= {f"model.layers.{layer}.self_attn.qkv_proj" for layer in range(layers)}
    return fused


def _modules_of(adapters: Iterable[Adapter]) -> set[str]:
    """The modules that adapters change."""
    saved = {name.rpartition(".")[0] for adapter in adapters for name in adapter.saved}
    return saved.union(*(adapter.factors for adapter in adapters))


def _check_weights(graph: ir.Graph, findings: Findings, weights: CheckpointWeights) -> None:
    """Warn of modules of the checkpoint that were not found, and raise ExportError if none was."""
    missing = weights.missing()
    if not findings.linears:
        seen = f" (seen: {weights.reasons[0]})" if weights.reasons else ""
        why = (
            unreached_layers(graph) or "it is of another model, or the exporter changed the weights"
        )
        raise ExportError(
            f"no product of the graph has the weight of a matrix in the checkpoint: {why}{seen}"
        )
    if weights.reasons:
        logger.warning(
            "similar to modules of the checkpoint, and left without adapters: %s",
            listed(weights.reasons, _LISTED),
        )
    if missing:
        names = listed_names(missing, _LISTED)
        logger.warning("modules of the checkpoint that were not found in the graph: %s", names)

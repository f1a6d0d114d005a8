"""Whether the manifest describes the graph and the base, where the numbers do not show it.

precision   that of the graph's weights, which decides the limits of the numbers
padding     the side on which rows are padded, as an export measures it
others      `DERIVED`: fields that follow from the graphs and from the base
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.modules.renamings import known
from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.fingerprint import file_fingerprint
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import (
    ADAPTER_MODE,
    GRAPH_DATA_NAME,
    GRAPH_NAME,
    GROUP_QUERY_ATTENTION_OPERATOR,
    LOGITS_TO_KEEP,
    NO_PADDING,
    OPERATOR_DOMAIN,
)
from loradeploy.bundle.sample import Sample
from loradeploy.errors import ExportError, shown
from loradeploy.export.adapters.own_weights import model_digests
from loradeploy.export.graph.file import TRACED_BY, load_graph, opset_of, spec_of
from loradeploy.export.graph.running import NotRunError
from loradeploy.export.match.products import precision_of
from loradeploy.export.passes.forms.branches import remove_branches
from loradeploy.export.passes.gqa import updates_cache_in_place
from loradeploy.export.passes.side_inputs.base_weights import stored_weights
from loradeploy.export.read.static_ranges import count_ranges
from loradeploy.export.read.values.cache import padding_of
from loradeploy.export.trial.opened import Trial
from loradeploy.export.trial.padding import padding_by_trial, reads_in_parts

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from loradeploy.bundle.targets import LoraTarget
    from loradeploy.parity.checks.files.graphs import BundleGraphs
    from loradeploy.parity.context import CheckContext


@dataclass(frozen=True, eq=False)
class Facts:
    """What the fields of a manifest follow from. `model`: the base in PyTorch, float32."""

    context: CheckContext
    graphs: BundleGraphs
    model: torch.nn.Module

    @property
    def traced(self) -> bool:
        """Whether the graph was traced, as it says itself; those of earlier versions do not."""
        stated = self.context.manifest.traced
        return stated or self.graphs.decoder.producer_name == TRACED_BY

    @cached_property
    def plain(self) -> ir.Model:
        """The graph in model.onnx without branches."""
        if ADAPTER_MODE not in self.inputs:
            return self.graphs.decoder
        graph = load_graph(self.context.bundle / GRAPH_NAME)
        remove_branches(graph.graph)
        return graph

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the graphs' inputs."""
        return tuple(str(value.name) for each in self.graphs.each for value in each.graph.inputs)


def differing_manifest(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield the aspect and a message for each field that is not that of the graph or the base."""
    manifest = facts.context.manifest
    for aspect, message in (("precision", _precision(facts)), ("padding", _padding(facts))):
        if message is not None:
            yield aspect, f"{message}: export again"
    for name, derive in DERIVED.items():
        expected = derive(facts)
        if expected is not None and getattr(manifest, name) != expected:
            stated = shown(getattr(manifest, name))
            yield (
                "manifest",
                f"the manifest's {name} is {stated}, expected {shown(expected)}: export again",
            )


def _precision(facts: Facts) -> str | None:
    """The two graphs of an encoder-decoder may differ: it is that of one of them."""
    stated = facts.context.manifest.precision
    found = [precision_of(graph) for graph in facts.graphs.each]
    if stated in found:
        return None
    return f"the manifest's precision is {stated}, and {GRAPH_NAME} has weights in {found[0]}"


def _padding(facts: Facts) -> str | None:
    """Measured only if it is not the usual side of such a graph: the phases run the stated one."""
    manifest = facts.context.manifest
    if manifest.task != CAUSAL_LM and manifest.padding != NO_PADDING:
        return None  # of an encoder's rows, the right side is padded
    usual = padding_of(facts.graphs.decoder)
    if manifest.task == CAUSAL_LM and manifest.padding == usual:
        return None
    measured = _tried(facts, padding_by_trial, padding=usual)
    if measured in (None, manifest.padding):
        return None
    return f"the manifest's padding is {manifest.padding}, and {GRAPH_NAME} is padded {measured}"


def _tried(facts: Facts, measure: Callable[[Trial, Sample, int], Any], **changes: Any) -> Any:
    """What `measure` returns for the graph, with these fields of its manifest; None if unknown."""
    context = facts.context
    pad = context.cases.pad
    sample = Sample(context.manifest.inputs, model_config(context.bundle), pad=pad)
    try:
        return measure(
            Trial(context.bundle, dataclasses.replace(context.manifest, **changes)), sample, pad
        )
    except (ExportError, NotRunError):
        return None


def _specs(facts: Facts, which: str) -> tuple[Any, ...] | None:
    """The graphs' inputs without a default, or outputs, in the order of the manifest."""
    found = {
        str(value.name): spec_of(value)
        for each in reversed(facts.graphs.each)
        for value in getattr(each.graph, which)
        if which == "outputs" or not value.is_initializer()
    }
    stated = getattr(facts.context.manifest, which)
    return stated if {spec.name: spec for spec in stated} == found else tuple(found.values())


def _whole_prompts(facts: Facts) -> bool | None:
    """Measured only if it is stated: the phases show prompts that are wrong in parts."""
    if facts.traced or not facts.context.manifest.whole_prompts:
        return False
    parts: bool | None = _tried(facts, reads_in_parts)
    return None if parts is None else not parts


def _own_weights(facts: Facts) -> Mapping[str, str] | None:
    """Of other exporters, and of a model without tables of tokens, they are those of the graph."""
    manifest = facts.context.manifest
    if not facts.traced or manifest.mode == "merged":
        return None
    added = manifest.added_tokens
    return model_digests(facts.model, None if added is None else added.base) or None


def _submodels(facts: Facts) -> tuple[Any, ...] | None:
    from loradeploy.lora.submodels import submodels

    traced = facts.traced and facts.context.manifest.mode != "merged"
    return known(submodels(facts.model)) if traced else None


def _base_prefix(facts: Facts) -> str | None:
    found = _submodels(facts)
    return None if found is None else str(facts.model.base_model_prefix) if found else ""


def _targets(facts: Facts) -> tuple[LoraTarget, ...]:
    """With the places of their weights in the data file."""
    found, _ = stored_weights(facts.graphs.initializers, facts.context.manifest)
    return found.targets


def _cache_in_place(facts: Facts) -> bool | None:
    """A call of the operators' library does not show it."""
    called = GROUP_QUERY_ATTENTION_OPERATOR in _called(facts)
    return None if called else updates_cache_in_place(facts.plain)


def _operators(facts: Facts) -> tuple[str, ...]:
    stated, found = facts.context.manifest.operators, _called(facts)
    return stated if set(stated) == found and len(stated) == len(found) else tuple(sorted(found))


def _called(facts: Facts) -> set[str]:
    """The functions of the operators' library that nodes call."""
    nodes = (node for each in facts.graphs.each for node in each.graph.all_nodes())
    return {node.op_type for node in nodes if node.domain == OPERATOR_DOMAIN}


def _fingerprint(facts: Facts) -> str | None:
    file = facts.context.bundle / GRAPH_DATA_NAME
    return file_fingerprint(file) if file.is_file() else None


# The fields that are derived again, with functions that return None if the value is not known.
DERIVED: Final[Mapping[str, Callable[[Facts], object]]] = {
    "opset": lambda facts: opset_of(facts.graphs.decoder),
    "inputs": lambda facts: _specs(facts, "inputs"),
    "outputs": lambda facts: _specs(facts, "outputs"),
    "traced": lambda facts: facts.traced,
    "whole_prompts": _whole_prompts,
    "own_weights": _own_weights,
    "submodels": _submodels,
    "base_prefix": _base_prefix,
    "cache_in_place": _cache_in_place,
    "fixed_ranges": lambda facts: count_ranges(facts.plain.graph),
    "logits_to_keep": lambda facts: LOGITS_TO_KEEP in facts.inputs,
    "branches": lambda facts: ADAPTER_MODE in facts.inputs,
    "operators": _operators,
    "targets": _targets,
    "data_fingerprint": _fingerprint,
}

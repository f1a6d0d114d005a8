"""Optimize a traced graph, and name its parts readably and the same in every export."""

from __future__ import annotations

import ast
import copy
import re
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.names import (
    ATTENTION_MASK,
    CROSS,
    DECODER_INPUT_IDS,
    INPUT_FEATURES,
    INPUT_IDS,
    PIXEL_VALUES,
    SELF,
    past_name,
)
from loradeploy.bundle.sample import in_patches
from loradeploy.export.graph.file import TRACED_BY, spec_of
from loradeploy.export.graph.scopes import NAME_SCOPES, module_path
from loradeploy.export.trace.cleanup.bfloat import compute_bfloat16_in_float32
from loradeploy.export.trace.cleanup.norms import widen_norms
from loradeploy.export.trace.cleanup.rotary import fuse_rotary
from loradeploy.export.trace.cleanup.sizes import fold_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir

_KEPT: Final = ("Gemm", "MatMul")
_NUMBER: Final = re.compile(r"(_\d+)+$")

# Equal constants of up to this size, such as shapes, are joined, so that their users can be too.
# Weights are not: an adapter merged into one of two equal weights must not change the other.
_JOINED_ELEMENTS: Final = 8
# The symbol for the batch of an encoder-decoder's source.
_SOURCES: Final = "source_batch"


def tidy(model: ir.Model, *, prefix: str) -> ir.Model:
    """Optimize `model` in place, name its parts after the checkpoint's, and return it.

    `prefix`: the module path of the model inside the traced wrapper. Metadata other than the module
    paths is removed: stack traces have file paths of the exporting machine.
    """
    _optimize(model)
    compute_bfloat16_in_float32(model.graph)
    _drop_metadata(model, prefix)
    name_dimensions(model)
    fold_sizes(model.graph)
    _rename_symbols(model.graph, {_SOURCES: "batch"})
    _name_initializers(model, prefix)
    _number_names(model.graph)
    model.producer_name, model.producer_version = TRACED_BY, None
    return model


def _optimize(model: ir.Model) -> None:
    """Apply torch.onnx's optimization, after eliminating common subexpressions.

    The rewrite rules take the most time, for each node: elimination before them makes them 5 times
    cheaper. Folding again after them is needed to recognize rotary embeddings.
    """
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter.onnx_fusions import fuse

    def join() -> None:
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.DeduplicateInitializersPass(size_limit=_JOINED_ELEMENTS)(model)
        common.CommonSubexpressionEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)

    common.InlinePass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)

    def fold() -> None:
        # Products of constants are linear layers too, which adapters may change: not folded.
        fold_constants(model, should_fold=lambda node: False if node.op_type in _KEPT else None)

    for _ in range(2):
        fold()
        common.RemoveUnusedNodesPass()(model)
        _rewrite(model)
    fold()
    join()
    fuse_rotary(model.graph)
    fuse(model)
    widen_norms(model.graph)
    join()
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


def _rewrite(model: ir.Model) -> None:
    """Apply onnxscript's rules, each only at nodes of its output's operator.

    A rule with several outputs lists the whole graph at each node before it compares the node's
    operator, which took a quarter of the time of an export of thirty layers.
    """
    from onnxscript import rewriter

    rules = rewriter._DEFAULT_REWRITE_RULES
    rewriter.rewrite(model, [_at_its_operator(rule) for rule in rules])


def _at_its_operator(rule: Any) -> Any:
    operator = rule._target_pattern.output_nodes[0].op_identifier()
    every = rule.try_rewrite

    def try_rewrite(model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any) -> Any:
        if operator is None or operator == node.op_identifier():
            return every(model, graph, node, **options)
        return None

    rule = copy.copy(rule)
    rule.try_rewrite = try_rewrite
    return rule


def _drop_metadata(model: ir.Model, prefix: str) -> None:
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph:
        scopes = node.metadata_props.get(NAME_SCOPES)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes:
            paths = [_without(prefix, s) for s in ast.literal_eval(scopes) if s != prefix]
            # The last one is the operator's, with torch's number: see `_number_names`.
            node.metadata_props[NAME_SCOPES] = str([*paths[:-1], _NUMBER.sub("", paths[-1])])
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def name_dimensions(model: ir.Model) -> None:
    """Rename an exporter's symbols (s26, batch_size, …) after their meaning (batch, …).

    A sum of past and sequence becomes `total`.
    """
    _rename_symbols(model.graph, _symbols(model.graph))


def _rename_symbols(graph: ir.Graph, names: Mapping[str, str]) -> None:
    import onnx_ir as ir

    def renamed(dimension: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if not isinstance(dimension, ir.SymbolicDim) or dimension.value is None:
            return dimension
        text = re.sub(r"\b\w+\b", lambda found: names.get(found[0], found[0]), dimension.value)
        parts = {part.strip() for part in text.split("+")}
        if parts in ({"past", "sequence"}, {"past", "target"}):
            text = "total"
        return ir.SymbolicDim(text)

    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def _symbols(graph: ir.Graph) -> Mapping[str, str]:
    known: dict[str, tuple[str | None, ...]] = {
        INPUT_IDS: ("batch", "sequence"),
        ATTENTION_MASK: ("batch", "total"),
        past_name(0, "key"): ("batch", None, "past"),
        DECODER_INPUT_IDS: ("batch", "target"),
        past_name(0, f"{SELF}key"): ("batch", None, "past"),
        past_name(0, f"{CROSS}key"): ("batch", None, "source"),
        PIXEL_VALUES: ("batch",),
    }
    # An encoder-decoder's mask is that of its source. The batches of its halves have separate
    # symbols while sizes are folded, so that neither half uses the other's inputs.
    if any(value.name == DECODER_INPUT_IDS for value in graph.inputs):
        known[ATTENTION_MASK] = known[INPUT_IDS] = (_SOURCES, "sequence")
        known[INPUT_FEATURES] = (_SOURCES,)
    if any(in_patches(spec_of(value)) for value in graph.inputs):
        known[PIXEL_VALUES] = ("batch", "rows", "columns")
    names: dict[str, str] = {}
    for value in graph.inputs:
        if value.name in known and value.shape is not None:
            for dimension, name in zip(value.shape, known[value.name], strict=False):
                if name is not None and not isinstance(dimension, int):
                    names.setdefault(str(dimension.value), name)
    return names


def _name_initializers(model: ir.Model, prefix: str) -> None:
    """Name each weight after the module that uses it, because folding replaced names by numbers."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        name = _without(prefix, str(value.name))
        for node, index in value.uses():
            module = module_path(node)
            takes_weight = (node.op_type in ("MatMul", "Gemm") and index == 1) or (
                node.op_type == "Gather" and index == 0
            )
            if module is not None and takes_weight and value.shape and len(value.shape) == 2:
                name = f"{module}.weight"
        _rename(graph, value, name)


def _number_names(graph: ir.Graph) -> None:
    """Number nodes and their outputs by operator, in the order of the graph.

    torch also numbers nodes that it removes, unevenly between layers. With new numbers, a trace of
    all layers and one of the first layers (repeat.py) have the same names.
    """
    kept = {str(value.name) for value in (*graph.inputs, *graph.outputs)}
    kept |= {str(name) for name in graph.initializers}
    counts: dict[str, int] = {}

    def numbered(name: str, taken: set[str]) -> str:
        base = _NUMBER.sub("", name)
        while True:
            number = counts[base] = counts.get(base, -1) + 1
            new = f"{base}_{number}" if number else base
            if new not in taken:
                return new

    for node in graph:
        for value in node.outputs:
            if value.name and value.name not in kept:
                value.name = numbered(value.name, kept)
    counts.clear()
    for node in graph:
        if node.name:
            node.name = numbered(node.name, set())


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if name == value.name or name in graph.initializers:
        return
    graph.initializers.pop(str(value.name))
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name
    graph.register_initializer(value)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(f"{prefix}.")

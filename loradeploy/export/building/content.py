"""Build a bundle's content from a checkpoint, an ONNX graph or a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from loradeploy.adapter.fitting.parts import any_below, own_part, without_masked_lm_head
from loradeploy.adapter.fitting.towers import tower_part
from loradeploy.adapter.modules.names import named_as
from loradeploy.adapter.modules.renamings import renamings
from loradeploy.adapter.tasks import CAUSAL_LM, GENERATING
from loradeploy.bundle.graph_form import BFLOAT16, GQA, STANDARD, form_of
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import PAST
from loradeploy.bundle.run_target import check_runs, choice_of
from loradeploy.errors import ExportError, UsageError, listed_names, prefixing_errors
from loradeploy.export.bases.base import Base, Options
from loradeploy.export.bases.checkpoint import from_checkpoint
from loradeploy.export.bases.graph import from_graph
from loradeploy.export.building.adapted import Adapted, with_side_inputs
from loradeploy.export.building.added import without_added_tokens
from loradeploy.export.building.config import with_config
from loradeploy.export.building.merged import merged, with_resized_vocabulary
from loradeploy.export.building.steps import encoder_part, modules_of, with_float_heads
from loradeploy.export.files.assets import AssetSources
from loradeploy.export.graph.file import outputs, required_inputs
from loradeploy.export.match.linears import Findings, find_linears
from loradeploy.export.match.observe import observe
from loradeploy.export.match.products import input_of, output_of, repeated_for_rows
from loradeploy.export.match.whole.layouts import settle_layouts
from loradeploy.export.match.whole.parts import find_parts
from loradeploy.export.passes.forms.static_shapes import use_static_shapes
from loradeploy.export.passes.gqa import (
    group_queries,
    has_grouped_attention,
    updates_cache_in_place,
)
from loradeploy.export.passes.operators.calls import use_operators
from loradeploy.export.passes.precision.bf16 import store_as_bfloat16
from loradeploy.export.read.files.settings import assets_of, settings_beside
from loradeploy.export.read.files.source import Source
from loradeploy.export.read.modules.find import find_modules
from loradeploy.export.write import Content
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.adapter.adapter import Adapter

logger = logger_of(__name__)


def build(source: Source, options: Options) -> tuple[Manifest, Content]:
    """Return the manifest and content of the bundle for `source`.

    Cheap checks come first: an adapter that does not fit is refused before anything is traced.
    """
    digests = {name: adapter.digest for name, adapter in options.adapters.items()}
    whole_digests = {name: adapter.whole_digest for name, adapter in options.adapters.items()}
    base = from_checkpoint(source, options) if source.graph is None else from_graph(source, options)
    options = dataclasses.replace(options, adapters=base.adapters)
    if options.operator and encoder_part(base):
        raise UsageError(
            "`operator` is not for encoder-decoders, which are two graphs: leave it out"
        )
    _choose_attention(base, options.attention or _attention_of_target(base, options.target))
    base, findings = _identified(source, base, options)
    adapters = _with_whole_digests(base.adapters, whole_digests)
    options = dataclasses.replace(options, adapters=adapters)
    if unknown := findings.unidentified:
        logger.warning("left as it is, its module is not known: %s", listed_names(unknown))
    findings = with_float_heads(base, findings, options)
    if source.graph is not None:
        for name, adapter in options.adapters.items():
            with prefixing_errors(name):
                settle_layouts(findings.linears, adapter)
    if options.merge:
        findings = without_added_tokens(base, findings)
        if source.graph is not None:
            base, findings = with_resized_vocabulary(base, findings, options)
        adapted = Adapted(merged(base, findings, options, digests))
    else:
        _observe(source, base, findings, options)
        adapted = with_side_inputs(base, findings, options)
    manifest = _in_form(base, adapted.manifest, options)
    manifest, config = with_config(base, source, manifest, options)
    return manifest, Content(
        graph=base.graph,
        assets=AssetSources(
            assets_of(source.assets, options.evidence.checkpoint),
            recipes=(source.directory, *filter(None, [options.evidence.checkpoint])),
            merged=options.directories if options.merge else {},
            vocabulary=base.vocabulary,
        ),
        config=config,
        adapters=adapted.adapters,
        side_inputs=adapted.arrays,
        defaults=adapted.defaults,
        biases=adapted.biases,
        required=bool(options.required_inputs),
        source=base.source,
        directories={} if options.merge else options.directories,
        whole_digests=whole_digests if base.other_part else {},
    )


def _identified(source: Source, base: Base, options: Options) -> tuple[Base, Findings]:
    """The base, with adapters whose modules are all named as in it, and its linear layers."""
    if source.graph is None:
        return base, find_linears(base.graph)
    findings = find_modules(
        base.graph,
        source.graph.parent,
        options.evidence,
        options.adapters.values(),
        proven=base.identity.kind == "checkpoint",
    )
    if source.manifest is None and any_below(findings.linears, base.other_part):
        # It is the whole model, as its weights show.
        base = dataclasses.replace(base, other_part=())
    modules = modules_of(base.graph, findings)
    rules = partial(renamings, base.submodels, base.base_prefix)
    adapters = {}
    for name, adapter in options.adapters.items():
        with prefixing_errors(name):
            own = own_part(tower_part(adapter, base.tower), base.other_part, rules)
            if base.task not in GENERATING:
                own = without_masked_lm_head(own, modules)
            adapters[name] = named_as(own, modules, rules)
    return dataclasses.replace(base, adapters=adapters), findings


def _in_form(base: Base, manifest: Manifest, options: Options) -> Manifest:
    """Bring the graph into the requested form; return its manifest.

    Raises:
        ExportError: no node can be a call of the operators' library.
        UsageError: the graph does not run on the target.
    """
    graph = base.graph
    if base.precision == BFLOAT16:
        store_as_bfloat16(graph.graph)
    if options.fixed:
        use_static_shapes(graph.graph, options.fixed)
        manifest = dataclasses.replace(
            manifest, inputs=required_inputs(graph), outputs=outputs(graph)
        )
    if options.operator:  # last, because no other pass knows the calls
        names = use_operators(graph, manifest)
        if not names and not options.operator_kept:
            raise ExportError(
                "no node of the graph can be a call of the operators' library: export without"
                " `operator`"
            )
        logger.info("the graph calls %s", ", ".join(names) or "no operator")
        manifest = dataclasses.replace(manifest, operators=names)
    manifest = dataclasses.replace(manifest, target=options.target)
    check_runs(
        options.target,
        {
            **dataclasses.asdict(form_of(manifest)),
            "required_inputs": bool(options.required_inputs),
            "cache": next((s.dtype for s in manifest.inputs if s.name.startswith(PAST)), None),
        },
    )
    return manifest


def _with_whole_digests(
    adapters: Mapping[str, Adapter], whole_digests: Mapping[str, str]
) -> dict[str, Adapter]:
    """Set `part_of` of adapters that are parts to the whole's digest before it was renamed."""
    return {
        name: each
        if each.part_of is None
        else dataclasses.replace(each, part_of=whole_digests[name])
        for name, each in adapters.items()
    }


def _choose_attention(base: Base, attention: str | None) -> None:
    """Convert the graph to the requested attention, if it has another."""
    if attention == STANDARD and has_grouped_attention(base.graph):
        raise ExportError(
            '`attention="standard"`: the graph has GroupQueryAttention, which cannot be made'
            " ONNX's Attention again: export the checkpoint"
        )
    if attention == GQA and not updates_cache_in_place(base.graph):
        if base.task != CAUSAL_LM:
            raise UsageError(f'`attention="gqa"` is for decoders with a cache, not for {base.task}')
        group_queries(base.graph)


def _attention_of_target(base: Base, target: str | None) -> str | None:
    """The target's default attention for a decoder with a cache; None for other models."""
    cached = any(str(value.name).startswith(PAST) for value in base.graph.graph.inputs)
    if base.task != CAUSAL_LM or not cached:
        return None
    chosen: str | None = choice_of(target, "attention", base.precision)
    return chosen


def _observe(source: Source, base: Base, findings: Findings, options: Options) -> None:
    """Run a graph of another exporter to see what its values are; a traced graph is known.

    That of a bundle is too, if its shapes are in the file as they were traced.
    """
    if source.graph is None:
        return
    values = list(_observed_values(base.graph, findings))
    before = base.before
    traced = before is not None and before.traced and not form_of(before).static_shapes
    if traced and all(value.shape is not None and value.dtype is not None for value in values):
        return
    settings = settings_beside(source.directory, options.evidence.checkpoint)
    observe(base.graph, values, source.graph.parent, settings)


def _observed_values(model: ir.Model, findings: Findings) -> Iterator[ir.Value]:
    """The values whose rows show whether side inputs can differ between rows of the batch."""
    for linear in findings.linears.values():
        for node in linear.nodes:
            yield output_of(node)
            if (repeated := repeated_for_rows(output_of(node))) is not None:
                yield repeated
            if (x := input_of(node)) is not None:
                yield x
    for part in find_parts(model).values():
        for node in part.nodes:
            yield from (value for value in (*node.inputs[:2], node.outputs[0]) if value is not None)

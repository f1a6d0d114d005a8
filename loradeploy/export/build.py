"""A bundle's content, from each kind of source: found, checked, then operated on."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from loradeploy.adapter.adapter import Kind
from loradeploy.adapter.heads import LABELED, problem_of, stated_problem, usual_problem
from loradeploy.adapter.names import named_as
from loradeploy.adapter.parts import own_part
from loradeploy.adapter.renamings import renamings
from loradeploy.adapter.settle import without_idle
from loradeploy.adapter.tasks import CAUSAL_LM, CLASSIFICATIONS, SEQ2SEQ_LM, SEQUENCE_CLASSIFICATION
from loradeploy.adapter.vocabulary import refuse_resized, resized_vocabulary
from loradeploy.bundle.adapter_inputs.factors import side_inputs_of_fitted
from loradeploy.bundle.fit import fit_to
from loradeploy.bundle.graph_form import (
    BFLOAT16,
    BIAS,
    DORA,
    GQA,
    PACKED_BITS,
    STANDARD,
    default_of,
    form_of,
)
from loradeploy.bundle.labels import output_count, with_all_labels
from loradeploy.bundle.manifest import (
    AdapterEntry,
    EncoderGraph,
    Manifest,
)
from loradeploy.bundle.names import CONFIG_NAME, PAST, ROWS, SLOTS
from loradeploy.bundle.run_target import check_runs, choice_of
from loradeploy.errors import (
    AdapterMismatchError,
    ExportError,
    ModelError,
    UsageError,
    listed,
    listed_names,
    shortened,
)
from loradeploy.export.base import Base, Options, from_checkpoint, from_graph
from loradeploy.export.given_adapters import (
    check_brought,
    label_count,
    label_names,
    named,
)
from loradeploy.export.graph.file import (
    opset_of,
    outputs,
    required_inputs,
)
from loradeploy.export.graph.halves import encoder_of
from loradeploy.export.match.biases import separate_biases
from loradeploy.export.match.experts import find_experts
from loradeploy.export.match.linears import (
    Findings,
    Linear,
    find_linears,
    is_head,
    output_head,
)
from loradeploy.export.match.norm_forms import check_known
from loradeploy.export.match.observe import observe
from loradeploy.export.match.operators import unreached
from loradeploy.export.match.parts import find_parts
from loradeploy.export.match.products import input_of, output_of, repeated_for_rows
from loradeploy.export.match.weights import to_bfloat16
from loradeploy.export.merge import merge_adapter
from loradeploy.export.merge_error import Round, warn_of
from loradeploy.export.own_weights import graph_digests
from loradeploy.export.passes.base_weights import GraphWeights
from loradeploy.export.passes.bf16 import store_as_bfloat16
from loradeploy.export.passes.branches import add_branches, branches_problem
from loradeploy.export.passes.fuse import fuse_products
from loradeploy.export.passes.gqa import group_queries, has_grouped_attention, keeps_cache
from loradeploy.export.passes.kept_logits import add_logits_to_keep, logits_to_keep_problem
from loradeploy.export.passes.layout import has_rows, use_row_layout
from loradeploy.export.passes.quantize import quantize, rounded
from loradeploy.export.passes.side_inputs import (
    Arrays,
    SideInputs,
    inject_side_inputs,
)
from loradeploy.export.passes.static_shapes import use_static_shapes
from loradeploy.export.passes.surgery import rows_problem
from loradeploy.export.passes.vocabulary import resize_vocabulary, vocabulary_in
from loradeploy.export.read.source import Source
from loradeploy.export.read.third_party import (
    assets_of,
    find_modules,
    padding_of,
    settings_beside,
)
from loradeploy.export.requirements import (
    choose_changes,
    choose_embeddings,
    choose_experts,
    needs_of,
)
from loradeploy.export.write import Content, with_labels, with_vocabulary
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.adapter.adapter import Adapter

logger = logger_of(__name__)


def build(source: Source, options: Options) -> tuple[Manifest, Content]:
    """The manifest and content of the bundle for `source`.

    Cheap checks come first: an adapter that does not fit is refused before anything is traced.
    """
    digests = {name: adapter.digest for name, adapter in options.adapters.items()}
    base = from_checkpoint(source, options) if source.graph is None else from_graph(source, options)
    options = dataclasses.replace(options, adapters=base.adapters)
    _choose_attention(base, options.attention or _attention_of_target(base, options.target))
    findings = (
        find_linears(base.graph)
        if source.graph is None
        else find_modules(
            base.graph, source.graph.parent, options.evidence, options.adapters.values()
        )
    )
    if source.graph is not None:
        modules = _modules(base.graph, findings)
        rules = partial(renamings, base.submodels, base.base_prefix)
        adapters = {}
        for name, adapter in options.adapters.items():
            with named(name):
                adapters[name] = named_as(own_part(adapter, base.other_part), modules, rules)
        options = dataclasses.replace(options, adapters=adapters)
    if unknown := findings.unidentified:
        logger.warning("left as it is, its module is not known: %s", listed_names(unknown))
    added: SideInputs | None = None
    fitted: Mapping[str, Adapter] = {}
    arrays: Mapping[str, Arrays] = {}
    if source.graph is not None:
        base, findings = _with_vocabulary(base, findings, options)
    if options.merge:
        manifest = _merged(base, findings, options, digests)
    else:
        if source.graph is not None:
            settings = settings_beside(source.directory, options.evidence.checkpoint)
            observe(
                base.graph, _observed_values(base.graph, findings), source.graph.parent, settings
            )
        manifest, added, fitted, arrays = _with_side_inputs(base, findings, options)
    if base.precision == BFLOAT16:
        store_as_bfloat16(base.graph.graph)
    if options.fixed:
        use_static_shapes(base.graph.graph, options.fixed)
        inputs, given = required_inputs(base.graph), outputs(base.graph)
        manifest = dataclasses.replace(manifest, inputs=inputs, outputs=given)
    manifest = dataclasses.replace(manifest, target=options.target)
    check_runs(
        options.target,
        {
            **dataclasses.asdict(form_of(manifest)),
            "required_inputs": bool(options.required_inputs),
            "cache": next((s.dtype for s in manifest.inputs if s.name.startswith(PAST)), None),
        },
    )
    settings = settings_beside(source.directory, options.evidence.checkpoint)
    count = label_count(options.adapters) if base.task in CLASSIFICATIONS else None
    if count is not None:
        count = output_count(manifest, settings) or count
    headless = options.merge or any(LABELED.fullmatch(name) for name in base.lacking)
    config = with_labels(settings, count, label_names(options.adapters) if headless else None)
    if base.task == SEQUENCE_CLASSIFICATION:
        manifest, config = _with_problem(manifest, config, options.adapters)
    if config and base.pad is not None:
        config["pad_token_id"] = base.pad
    if base.vocabulary is not None:
        config = with_vocabulary(config, base.vocabulary)
    return manifest, Content(
        graph=base.graph,
        assets=assets_of(source.assets, options.evidence.checkpoint),
        config=config,
        adapters=fitted,
        side_inputs=arrays,
        defaults={} if added is None else added.defaults,
        biases={} if added is None else added.biases,
        required=bool(options.required_inputs),
        source=base.source,
        directories={} if options.merge else options.directories,
        merged=options.directories if options.merge else {},
        recipes=(source.directory, *filter(None, [options.evidence.checkpoint])),
    )


def _with_problem(
    manifest: Manifest, config: dict[str, Any], adapters: Mapping[str, Adapter]
) -> tuple[Manifest, dict[str, Any]]:
    """What the outputs of a classifier's own head are, or of the merged adapter's."""
    stated = stated_problem(config, CONFIG_NAME, error=ModelError)
    count = output_count(manifest, config)
    if manifest.merged_adapter is None:
        return dataclasses.replace(manifest, problem_type=stated or usual_problem(count)), config
    (adapter,) = adapters.values()
    problem = problem_of(adapter, stated, count)
    entry = dataclasses.replace(manifest.merged_adapter, problem_type=problem)
    manifest = dataclasses.replace(manifest, problem_type=problem, merged_adapter=entry)
    return manifest, {**config, "problem_type": problem} if config else config


def _choose_attention(base: Base, attention: str | None) -> None:
    """Give the graph the attention that is asked for, where it has another."""
    if attention == STANDARD and has_grouped_attention(base.graph):
        raise ExportError(
            '`attention="standard"`: the graph has GroupQueryAttention, which cannot be made'
            " ONNX's Attention again: export the checkpoint"
        )
    if attention == GQA and not keeps_cache(base.graph):
        if base.task != CAUSAL_LM:
            raise UsageError(f'`attention="gqa"` is for decoders with a cache, not for {base.task}')
        group_queries(base.graph)


def _attention_of_target(base: Base, target: str | None) -> str | None:
    """The attention that the target chooses for a decoder with a cache."""
    cached = any(str(value.name).startswith(PAST) for value in base.graph.graph.inputs)
    if base.task != CAUSAL_LM or not cached:
        return None
    chosen: str | None = choice_of(target, "attention", base.precision)
    return chosen


def _modules(model: ir.Model, findings: Findings) -> set[str]:
    """The names of all that an adapter may have factors for."""
    return {*findings.linears, *find_parts(model), *find_experts(model)}


def _observed_values(model: ir.Model, findings: Findings) -> Iterator[ir.Value]:
    """The values whose rows tell whether side inputs can have rows of their own."""
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


def _with_side_inputs(
    base: Base, findings: Findings, options: Options
) -> tuple[Manifest, SideInputs, Mapping[str, Adapter], Mapping[str, Arrays]]:
    parts = find_parts(base.graph)
    own_weights = base.own_weights
    if not own_weights and base.before is None:
        own_weights = graph_digests(findings.linears, parts, output_head(base.graph, findings))
    needs = needs_of(
        options.adapters.values(),
        options.side_inputs,
        base.before,
        embeddings_of=[module for module, part in parts.items() if part.kind == "embedding"],
        own_weights=own_weights,
    )
    _check_form_of_halves(base, options)
    findings = _with_biases(base, findings, options, needs.changed)
    targets, heads = _split(base, findings, options.adapters.values(), needs.tokens)
    parts = find_parts(base.graph)
    graph = base.graph.graph
    embeddings = choose_embeddings(graph, parts, needs)
    experts = choose_experts(find_experts(base.graph), needs)
    changes = choose_changes(graph, targets, embeddings, parts, needs, base.parameters)
    if not targets and not heads:
        raise ExportError(
            "no linear layer of the graph was identified as a module of the checkpoint"
            + (f"; seen: {listed_names(unknown, 4)}" if (unknown := findings.unidentified) else "")
        )
    # A bias of zeros leaves no trace in a graph.
    known = base.parameters | {name for a in options.adapters.values() for name in a.saved}
    biased = [head.module for head in heads if f"{head.module}.bias" in known]
    layers = len(targets) + len(heads) + len(embeddings) + len(experts)
    logger.info("giving %d layers side inputs", layers)
    added = inject_side_inputs(
        base.graph,
        targets,
        heads,
        biased=biased,
        embeddings=embeddings,
        experts=experts,
        changes=changes,
    )
    manifest = dataclasses.replace(
        _manifest(base, "side-inputs"),
        targets=added.targets,
        saved=tuple(
            dataclasses.replace(saved, lacking=saved.parameter in base.lacking)
            for saved in added.saved
        ),
        changed=added.changed,
        factor_dtype=added.dtype,
        own_weights=own_weights,
        submodels=base.submodels,
        base_prefix=base.base_prefix if base.submodels else "",
    )
    adapters = {}
    for name, adapter in options.adapters.items():
        with _checked(name, graph):
            adapters[name] = fit_to(adapter, manifest, base.called)
    # Before the weights are quantized: DoRA's scales are computed from them.
    weights = GraphWeights(graph, added.biases)
    arrays = {n: side_inputs_of_fitted(each, manifest, weights) for n, each in adapters.items()}
    manifest = _quantized(base, manifest)
    if (layout := options.layout or _layout(base, options.target)) == ROWS:
        use_row_layout(graph)
    # Branches cost no memory where weights are quantized: those are shared between them.
    shared = default_of("branches", base.precision, options.target)
    manifest = _keeping_logits(base, manifest, options)
    if branches := (
        shared and branches_problem(graph) is None and not _encoder(base)
        if options.branches is None
        else options.branches
    ):
        add_branches(graph)
    manifest = dataclasses.replace(manifest, layout=layout, branches=branches)
    return manifest, added, adapters, arrays


def _check_form_of_halves(base: Base, options: Options) -> None:
    """Refuse the forms that a graph in two halves does not have."""
    for name, asked in (
        ("branches", options.branches),
        ("required_inputs", options.required_inputs),
    ):
        if asked and _encoder(base):
            raise UsageError(
                f"`{name}` is not for encoder-decoders, which are two graphs: leave it out"
            )


def _with_biases(
    base: Base, findings: Findings, options: Options, changed: Iterable[str]
) -> Findings:
    """The findings once the biases that adapters change are additions of their own."""
    modules = {*changed, *(m for m in findings.linears if is_head(m))}
    for adapter in options.adapters.values():
        modules |= {name.rpartition(".")[0] for name in adapter.saved}
    if BIAS in options.side_inputs or DORA in options.side_inputs:
        modules |= findings.linears.keys()
    linears = separate_biases(base.graph.graph, findings.linears, modules)
    return dataclasses.replace(findings, linears=linears)


def _layout(base: Base, target: str | None) -> str:
    """Rows where they are the default, and the graph can have them."""
    layout: str = default_of("layout", base.precision, target)
    return layout if layout == SLOTS or has_rows(base.graph.graph) else SLOTS


def _with_vocabulary(base: Base, findings: Findings, options: Options) -> tuple[Base, Findings]:
    """The base and its findings with the vocabulary of the adapter that is to be merged.

    Raises:
        AdapterMismatchError: it is another one than the base's, and the adapter not to be merged.
    """
    before = vocabulary_in(base.graph, findings) if options.adapters else None
    if before is None:
        return base, findings
    size = None
    for name, adapter in options.adapters.items():
        with named(name):
            if options.merge:
                size = resized_vocabulary(adapter, before)
            else:
                refuse_resized(adapter, before)
    if size is None:
        return base, findings
    findings = resize_vocabulary(base.graph, findings, size)
    return dataclasses.replace(base, vocabulary=size), findings


def _merged(
    base: Base, findings: Findings, options: Options, digests: Mapping[str, str]
) -> Manifest:
    ((name, given),) = options.adapters.items()
    adapter = given if base.before is None else with_all_labels(given, base.before.saved_shapes())
    adapter = without_idle(adapter, _modules(base.graph, findings))
    check_brought(name, adapter, base.lacking)
    whole = {**adapter.carried, **adapter.saved}
    check_known(base.graph, whole)
    findings = _with_biases(base, findings, options, ())
    logger.info("merging %s", name)
    with _checked(name, base.graph.graph):
        report = merge_adapter(
            base.graph,
            findings.linears,
            adapter,
            weights=base.weights,
            rounding=_rounding(base),
            requantize=options.requantize,
            name=base.called,
            digest=base.identity.digest if base.identity.kind == "checkpoint" else None,
        )
    warn_of(report.error, base.precision)
    for module in report.untied:
        logger.info("%s shares its weight and got a copy of its own", module)
    fuse_products(base.graph.graph, find_linears(base.graph).linears.values())
    manifest = dataclasses.replace(
        _manifest(base, "merged"),
        merged_adapter=AdapterEntry(digests[name], labels=adapter.labels),
        merge_error=report.error,
        requantized=base.quantized and options.requantize and base.precision in PACKED_BITS,
    )
    return _keeping_logits(base, _quantized(base, manifest), options)


def _keeping_logits(base: Base, manifest: Manifest, options: Options) -> Manifest:
    """The manifest of the graph once the positions that get logits can be chosen.

    Raises:
        ExportError: that is asked for, and the graph cannot have it.
    """
    asked, graph = options.logits_to_keep, base.graph.graph
    if asked is None:
        wanted = default_of("logits_to_keep", base.precision, options.target)
        # A merged graph has no inputs but the model's own, unless it is asked for.
        if base.task != CAUSAL_LM or options.fixed or not wanted or options.merge:
            return manifest
        if (problem := logits_to_keep_problem(graph, manifest)) is not None:
            logger.info("the logits are of all positions: %s", problem)
            return manifest
    elif not asked:
        return manifest
    add_logits_to_keep(graph, manifest)
    return dataclasses.replace(manifest, logits_to_keep=True, outputs=outputs(base.graph))


def _rounding(base: Base) -> dict[str, Round]:
    """What becomes of merged weights once they are stored, by kind of layer."""
    if base.precision == BFLOAT16:
        return dict.fromkeys(get_args(Kind), to_bfloat16)
    bits = PACKED_BITS.get(base.precision)
    return {} if bits is None or base.quantized else {"linear": partial(rounded, bits=bits)}


@contextmanager
def _checked(name: str, graph: ir.Graph) -> Iterator[None]:
    """`named`, with the operators of the graph that take no adapters, where one does not fit."""
    try:
        with named(name):
            yield
    except AdapterMismatchError as problem:
        others = [f"{op} ({count})" for op, count in unreached(graph).items()]
        if not others:
            raise
        raise AdapterMismatchError(
            f"{shortened(str(problem), 180)}; layers in {listed_names(others, 2)} take no adapters:"
            " give the graph as it was before its operators were fused or quantized"
        ) from None


def _split(
    base: Base, findings: Findings, adapters: Iterable[Adapter], tokens: Collection[str]
) -> tuple[list[Linear], list[Linear]]:
    """The linears that take factors, and those that are replaced whole.

    `tokens`: those that take factors for trained rows.
    """
    targeted = {*tokens, *(module for adapter in adapters for module in adapter.factors)}
    saved = base.replaced | {
        name.removesuffix(".weight") for adapter in adapters for name in adapter.saved
    }
    head = output_head(base.graph, findings)
    targets, heads, left = [], [], []
    for module, linear in findings.linears.items():
        classifies = base.task in CLASSIFICATIONS and is_head(module)
        if module not in targeted and (classifies or module in saved):
            heads.append(linear)
            continue
        # A decoder's head is as large as the vocabulary: it takes factors only if one wants it.
        if module == head and base.task in (CAUSAL_LM, SEQ2SEQ_LM) and module not in targeted:
            continue
        # Rows that are not the batch's take no factors: left alone, unless one wants them.
        problem = rows_problem(base.graph.graph, linear.nodes, linear.module)
        if problem is None:
            targets.append(linear)
        elif module in targeted:
            raise problem
        else:
            left.append(str(problem))
    if left:
        logger.warning("left as it is: %s", listed(left))
    return targets, heads


def _manifest(base: Base, mode: Any) -> Manifest:
    return Manifest(
        task=base.task,
        mode=mode,
        base=base.identity,
        precision=base.precision,
        opset=opset_of(base.graph),
        inputs=required_inputs(base.graph),
        outputs=outputs(base.graph),
        padding=padding_of(base.graph),
        cache_in_place=keeps_cache(base.graph),
        embeds=base.embeds,
        other_part=base.other_part,
        encoder=_encoder(base),
    )


def _encoder(base: Base) -> EncoderGraph | None:
    """The encoder's part of an encoder-decoder's graph, where it is a part of its own."""
    if base.task != SEQ2SEQ_LM:
        return None
    return encoder_of(required_inputs(base.graph), outputs(base.graph))


def _quantized(base: Base, manifest: Manifest) -> Manifest:
    """The manifest with quantized weights, where they are to be and are not yet."""
    bits = PACKED_BITS.get(base.precision)
    if bits is None or base.quantized:
        return manifest
    logger.info("quantizing the weights to %s", base.precision)
    return quantize(base.graph, manifest, bits)

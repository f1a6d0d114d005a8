"""Add side inputs to a base graph, and fit the adapters to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.tasks import GENERATING, HEADED
from loradeploy.bundle.adapter_inputs.factors import side_inputs_of_fitted
from loradeploy.bundle.fitting.fit import fit_to
from loradeploy.bundle.graph_form import BIAS, LORA, SIDE_INPUT_KINDS, default_of, form_of
from loradeploy.bundle.manifest import AddedTokens, Manifest
from loradeploy.bundle.names import ROWS, SLOTS
from loradeploy.bundle.run_target import choice_of
from loradeploy.errors import ExportError, UsageError, listed, listed_names
from loradeploy.export.adapters.requirements import (
    Needs,
    choose_changes,
    choose_embeddings,
    choose_experts,
    needs_of,
)
from loradeploy.export.bases.base import Base, Options
from loradeploy.export.building.added import with_added_tokens
from loradeploy.export.building.steps import (
    base_manifest,
    encoder_part,
    explaining_mismatch,
    own_weights_of,
    with_logits_to_keep,
    with_quantized_weights,
    with_separate_biases,
)
from loradeploy.export.match.experts import find_experts
from loradeploy.export.match.linears import Findings, Linear, is_head, output_head
from loradeploy.export.match.operators import unreached_layers
from loradeploy.export.match.whole.parts import find_parts
from loradeploy.export.passes.forms.branches import add_branches, branches_problem
from loradeploy.export.passes.forms.layout import supports_rows, use_row_layout
from loradeploy.export.passes.side_inputs.base_weights import GraphWeights
from loradeploy.export.passes.side_inputs.inject import Arrays, SideInputs, inject_side_inputs
from loradeploy.export.passes.side_inputs.rows import rows_problem
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter

logger = logger_of(__name__)


@dataclass(frozen=True, eq=False)
class Adapted:
    """The manifest of a graph with side inputs or a merged adapter, and values of the side inputs.

    `adapters`: those that were given, fitted to the manifest. `arrays`: their values, by adapter
    and input name. `defaults`, `biases`: see `Content`.
    """

    manifest: Manifest
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    arrays: Mapping[str, Arrays] = field(default_factory=dict)
    defaults: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    biases: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def with_side_inputs(base: Base, findings: Findings, options: Options) -> Adapted:
    """Add side inputs to the base graph, and compute their values for the adapters.

    Raises:
        AdapterError: an adapter does not fit. ExportError: no layer of the graph takes factors.
    """
    embeddings = [m for m, part in find_parts(base.graph).items() if part.kind == "embedding"]
    own_weights = own_weights_of(base, findings)
    findings, options, added_tokens = with_added_tokens(base, findings, options)
    needs = needs_of(
        options.adapters.values(),
        options.side_inputs,
        base.before,
        embeddings_of=embeddings,
        own_weights=own_weights,
    )
    _check_form_of_halves(base, options)
    findings = with_separate_biases(base, findings, options, needs.changed)
    added = _injected(base, findings, options, needs, added_tokens)
    manifest = dataclasses.replace(
        base_manifest(base, "side-inputs"),
        targets=added.targets,
        saved=tuple(
            dataclasses.replace(saved, lacking=saved.parameter in base.lacking)
            for saved in added.saved
        ),
        changed=added.changed,
        factor_dtype=added.dtype,
        added_tokens=added_tokens,
        own_weights=own_weights,
        submodels=base.submodels,
        base_prefix=base.base_prefix if base.submodels else "",
    )
    adapters = {}
    for name, adapter in options.adapters.items():
        with explaining_mismatch(name, base, findings):
            adapters[name] = fit_to(adapter, manifest, base.display_name)
    # Before the weights are quantized: DoRA's scales are computed from them.
    graph = base.graph.graph
    weights = GraphWeights(graph, added.biases)
    arrays = {n: side_inputs_of_fitted(each, manifest, weights) for n, each in adapters.items()}
    if options.operator and added.dtype != "float32":
        raise ExportError(
            f"the linear layers compute in {added.dtype}, the operators compute in float32: export"
            " without `operator`"
        )
    manifest = with_quantized_weights(base, manifest, options)
    layout = options.layout or _layout(base, options)
    if layout == ROWS:
        use_row_layout(graph)
    manifest = with_logits_to_keep(base, manifest, options)
    branches = _has_branches(base, options)
    if branches:
        add_branches(graph)
    manifest = dataclasses.replace(manifest, layout=layout, branches=branches)
    _warn_of_absent(options.side_inputs, manifest)
    return Adapted(manifest, adapters, arrays, added.defaults, added.biases)


def _injected(
    base: Base,
    findings: Findings,
    options: Options,
    needs: Needs,
    added_tokens: AddedTokens | None,
) -> SideInputs:
    """Choose the layers that get side inputs, of each kind, and add them to the graph.

    Raises:
        ExportError: there are none.
    """
    graph, parts = base.graph.graph, find_parts(base.graph)
    targets, heads = _split(base, findings, options.adapters.values(), needs.tokens)
    embeddings = choose_embeddings(graph, parts, needs)
    experts = choose_experts(find_experts(base.graph), needs)
    changes = choose_changes(graph, targets, embeddings, parts, needs, base.parameters)
    if not targets and not heads:
        if unknown := findings.unidentified:
            why = f"give `checkpoint` or `module_map` to identify {listed_names(unknown, 4)}"
        else:
            why = unreached_layers(graph) or (
                "no product has a constant matrix: give the graph with its weights, in another form"
            )
        raise ExportError(
            f"no linear layer of the graph was identified as a module of the checkpoint: {why}"
        )
    # A graph does not show biases of zeros.
    known = base.parameters | {name for a in options.adapters.values() for name in a.saved}
    biased = [head.module for head in heads if f"{head.module}.bias" in known]
    layers = len(targets) + len(heads) + len(embeddings) + len(experts)
    logger.info("giving %d layers side inputs", layers)
    return inject_side_inputs(
        base.graph,
        targets,
        heads,
        biased=biased,
        embeddings=embeddings,
        experts=experts,
        changes=changes,
        added=added_tokens,
    )


def _warn_of_absent(requested: Collection[str], manifest: Manifest) -> None:
    """Warn of requested kinds of side inputs for which the graph has no layer."""
    kinds = form_of(manifest).side_inputs | {LORA}
    if any(change.offset for change in manifest.changed):
        kinds |= {BIAS}  # with scales too
    for kind in sorted(set(requested) - kinds):
        logger.warning(
            "`side_inputs=[%r]`: no layer of the graph can have %s", kind, SIDE_INPUT_KINDS[kind]
        )


def _check_form_of_halves(base: Base, options: Options) -> None:
    """Raise UsageError for options that an encoder-decoder, which is two graphs, does not have."""
    if not encoder_part(base):
        return
    for name in ("branches", "required_inputs"):
        if not getattr(options, name):
            continue
        chosen = choice_of(options.target, name, base.precision)
        given = f"`target={options.target!r}` has `{name}`, which" if chosen else f"`{name}`"
        advice = "choose another target" if chosen else "leave it out"
        raise UsageError(f"{given} is not for encoder-decoders, which are two graphs: {advice}")


def _has_branches(base: Base, options: Options) -> bool:
    """Whether the base gets its own branch: by default where quantized weights can be shared."""
    if options.branches is not None:
        return options.branches
    operator = bool(options.operator)
    shared = default_of("branches", base.precision, options.target, operator=operator)
    return bool(shared) and branches_problem(base.graph.graph) is None and not encoder_part(base)


def _layout(base: Base, options: Options) -> str:
    """The default layout; slots if the graph needs their numbers."""
    operator = bool(options.operator)
    layout: str = default_of("layout", base.precision, options.target, operator=operator)
    return layout if layout == SLOTS or supports_rows(base.graph.graph) else SLOTS


def _split(
    base: Base, findings: Findings, adapters: Iterable[Adapter], tokens: Collection[str]
) -> tuple[list[Linear], list[Linear]]:
    """The linear layers that get factors, and those whose whole weight is a side input.

    `tokens`: modules that get factors for trained rows.
    """
    targeted = {*tokens, *(module for adapter in adapters for module in adapter.factors)}
    saved = base.replaced | {
        name.removesuffix(".weight") for adapter in adapters for name in adapter.saved
    }
    head = output_head(base.graph, findings)
    targets, heads, left = [], [], []
    for module, linear in findings.linears.items():
        classifies = base.task in HEADED and is_head(module)
        if module not in targeted and (classifies or module in saved):
            heads.append(linear)
            continue
        # A decoder's head is as large as the vocabulary: it gets factors only if targeted.
        if module == head and base.task in GENERATING and module not in targeted:
            continue
        # Inputs whose rows are not the batch's cannot have factors: skipped unless targeted.
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

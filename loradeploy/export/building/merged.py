"""Merge an adapter into a base graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import get_args

from loradeploy.adapter.adapter import Kind
from loradeploy.adapter.fitting.settle import without_idle
from loradeploy.adapter.fitting.vocabulary import resized_vocabulary, warn_of_resize
from loradeploy.bundle.fitting.labels import check_label_names, with_all_labels
from loradeploy.bundle.graph_form import BFLOAT16, PACKED_BITS
from loradeploy.bundle.manifest import AdapterEntry, Manifest
from loradeploy.errors import prefixing_errors
from loradeploy.export.adapters.given import check_brought
from loradeploy.export.adapters.own_weights import without_copies_of_graph
from loradeploy.export.bases.base import Base, Options
from loradeploy.export.building.steps import (
    base_manifest,
    explaining_mismatch,
    modules_of,
    own_weights_of,
    with_logits_to_keep,
    with_quantized_weights,
    with_separate_biases,
)
from loradeploy.export.graph.edit import free_constants
from loradeploy.export.match.linears import Findings, find_linears
from loradeploy.export.match.modules.weights import to_bfloat16
from loradeploy.export.match.whole.norm_forms import check_known
from loradeploy.export.merge import merge_adapter
from loradeploy.export.merge_error import Round, warn_of
from loradeploy.export.passes.fuse import fuse_products
from loradeploy.export.passes.precision.quantize import rounded
from loradeploy.export.passes.tokens.vocabulary import resize_vocabulary, vocabulary_in
from loradeploy.printable import logger_of

logger = logger_of(__name__)


def merged(
    base: Base, findings: Findings, options: Options, digests: Mapping[str, str]
) -> Manifest:
    """Merge the one adapter of the options into the base, and return the graph's manifest.

    Raises:
        AdapterError: the adapter does not fit.
    """
    ((name, given),) = options.adapters.items()
    adapter = given if base.before is None else with_all_labels(given, base.before.saved_shapes())
    if adapter is given:
        with prefixing_errors(name):
            check_label_names(adapter, base_manifest(base, "merged"), {})
    adapter = without_idle(adapter, modules_of(base.graph, findings))
    if base.source.graph is not None and (adapter.carried or adapter.rows):
        with prefixing_errors(name):
            adapter = without_copies_of_graph(
                adapter,
                own_weights_of(base, findings),
                findings.linears,
                vocabulary_in(base.graph, findings),
                proven=base.before is not None and base.identity.kind == "checkpoint",
                ties_head=base.ties_head,
            )
    check_brought(name, adapter, base.lacking)
    whole = {**adapter.carried, **adapter.saved}
    check_known(base.graph, whole)
    findings = with_separate_biases(base, findings, options, ())
    logger.info("merging %s", name)
    with explaining_mismatch(name, base, findings):
        report = merge_adapter(
            base.graph,
            findings.linears,
            adapter,
            weights=base.weights,
            rounding=_rounding(base),
            requantize=options.requantize,
            name=base.display_name,
            digest=base.identity.digest if base.identity.kind == "checkpoint" else None,
        )
    warn_of(report.error, base.precision)
    for module in report.untied:
        logger.info("%s shares its weight and got a separate copy", module)
    linears = find_linears(base.graph).linears.values()
    fuse_products(base.graph.graph, linears)
    free_constants(base.graph.graph, [linear.weight for linear in linears])
    manifest = dataclasses.replace(
        base_manifest(base, "merged"),
        merged_adapter=AdapterEntry(
            digests[name],
            labels=adapter.labels,
            whole_digest=(given.part_of or digests[name]) if base.other_part else None,
            split=bool(base.other_part) and given.part_of is not None,
        ),
        merge_error=report.error,
        requantized=base.quantized and options.requantize and base.precision in PACKED_BITS,
    )
    manifest = with_quantized_weights(base, manifest, options)
    return with_logits_to_keep(base, manifest, options)


def with_resized_vocabulary(
    base: Base, findings: Findings, options: Options
) -> tuple[Base, Findings]:
    """Resize the base's vocabulary to that of the adapter to merge; return base and findings.

    Raises:
        AdapterMismatchError: rows of added tokens are in neither the base nor the adapter.
    """
    before = vocabulary_in(base.graph, findings)
    if before is None:
        return base, findings
    ((name, adapter),) = options.adapters.items()
    with prefixing_errors(name):
        size = resized_vocabulary(adapter, before)
    if size is None:
        return base, findings
    warn_of_resize(name, before.size, size)
    findings = resize_vocabulary(
        base.graph,
        findings,
        size,
        f"the adapter's vocabulary has {size} tokens in place of {before.size}: merge it into the"
        " unquantized checkpoint",
    )
    return dataclasses.replace(base, vocabulary=size), findings


def _rounding(base: Base) -> dict[str, Round]:
    """How merged weights are rounded when they are stored, by kind of layer."""
    if base.precision == BFLOAT16:
        return dict.fromkeys(get_args(Kind), to_bfloat16)
    bits = PACKED_BITS.get(base.precision)
    return {} if bits is None or base.quantized else {"linear": partial(rounded, bits=bits)}

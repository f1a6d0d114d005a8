"""Steps that a merge and an export with side inputs have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.tasks import CAUSAL_LM, HEADED, SEQ2SEQ_LM
from loradeploy.bundle.graph_form import (
    BIAS,
    DORA,
    PACKED_BITS,
    default_of,
)
from loradeploy.bundle.manifest import (
    EncoderGraph,
    Manifest,
)
from loradeploy.errors import (
    AdapterMismatchError,
    ExportError,
    prefixing_errors,
    shortened,
)
from loradeploy.export.adapters.own_weights import graph_digests
from loradeploy.export.bases.base import Base, Options
from loradeploy.export.graph.file import (
    opset_of,
    outputs,
    required_inputs,
)
from loradeploy.export.graph.halves import encoder_of
from loradeploy.export.match.experts import find_experts
from loradeploy.export.match.linears import (
    Findings,
    is_head,
    output_head,
)
from loradeploy.export.match.operators import unreached_layers
from loradeploy.export.match.whole.biases import separate_biases
from loradeploy.export.match.whole.parts import find_parts
from loradeploy.export.passes.gqa import updates_cache_in_place
from loradeploy.export.passes.precision.dequantize import with_float_weight
from loradeploy.export.passes.precision.embedding import quantize_embedding
from loradeploy.export.passes.precision.quantize import quantize
from loradeploy.export.passes.tokens.kept_logits import add_logits_to_keep, logits_to_keep_problem
from loradeploy.export.passes.tokens.vocabulary import vocabulary_in
from loradeploy.export.read.static_ranges import count_ranges
from loradeploy.export.read.values.cache import padding_of
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir


logger = logger_of(__name__)


def modules_of(model: ir.Model, findings: Findings) -> set[str]:
    """The names of all modules and parameters that an adapter may have factors for."""
    return {*findings.linears, *find_parts(model), *find_experts(model)}


def own_weights_of(base: Base, findings: Findings) -> Mapping[str, str]:
    """`Manifest.own_weights` of the base."""
    if base.own_weights or base.before is not None:
        return base.own_weights
    return graph_digests(
        findings.linears,
        find_parts(base.graph),
        vocabulary_in(base.graph, findings),
        output_head(base.graph, findings),
        base.ties_head,
    )


def with_separate_biases(
    base: Base, findings: Findings, options: Options, changed: Iterable[str]
) -> Findings:
    """Turn fused biases that adapters change into separate additions; return the findings."""
    modules = {*changed, *(m for m in findings.linears if is_head(m))}
    for adapter in options.adapters.values():
        modules |= {name.rpartition(".")[0] for name in adapter.saved}
        modules |= {name for name, pair in adapter.factors.items() if pair.bias is not None}
    if BIAS in options.side_inputs or DORA in options.side_inputs:
        modules |= findings.linears.keys()
    linears = separate_biases(base.graph.graph, findings.linears, modules)
    return dataclasses.replace(findings, linears=linears)


def with_float_heads(base: Base, findings: Findings, options: Options) -> Findings:
    """Make quantized layers float whose whole weight adapters replace; return the findings."""
    adapters = options.adapters.values()
    replaced = {name.removesuffix(".weight") for adapter in adapters for name in adapter.saved}
    targeted = {module for adapter in adapters for module in adapter.factors}
    linears = dict(findings.linears)
    for module, linear in linears.items():
        is_side_input = (
            not options.merge and module not in targeted and base.task in HEADED and is_head(module)
        )
        if linear.quantized and (module in replaced or is_side_input):
            linears[module] = with_float_weight(base.graph.graph, linear)
            if not linears[module].quantized:
                logger.info("%s is computed in float, because adapters replace it", module)
    return dataclasses.replace(findings, linears=linears)


def with_logits_to_keep(base: Base, manifest: Manifest, options: Options) -> Manifest:
    """Add the input `logits_to_keep`, on request or by default, and return the manifest.

    Raises:
        ExportError: it is requested, and the graph does not support it.
    """
    requested, graph = options.logits_to_keep, base.graph.graph
    if requested is None:
        default = default_of("logits_to_keep", base.precision, options.target)
        # A merged graph has only the model's inputs, unless others are requested.
        if base.task != CAUSAL_LM or options.fixed or not default or options.merge:
            return manifest
        if (problem := logits_to_keep_problem(graph, manifest)) is not None:
            logger.info("logits are computed for all positions: %s", problem)
            return manifest
    elif not requested:
        return manifest
    add_logits_to_keep(graph, manifest)
    return dataclasses.replace(manifest, logits_to_keep=True, outputs=outputs(base.graph))


# Advice for a graph whose names do not identify its modules.
_BY_NUMBERS: Final = (
    "layers without known names are found by their numbers: give `checkpoint`, the directory of the"
    " model that the graph was exported from"
)


@contextmanager
def explaining_mismatch(name: str, base: Base, findings: Findings) -> Iterator[None]:
    """As `prefixing_errors`; a mismatch also lists layers that are unknown or take no adapters."""
    try:
        with prefixing_errors(name):
            yield
    except AdapterMismatchError as problem:
        others = unreached_layers(base.graph.graph)
        why = []
        if others is not None:
            why.append(others)
        hidden = findings.unidentified or others
        if hidden and base.before is None and base.identity.kind == "onnx":
            why.append(_BY_NUMBERS)
        if not why:
            raise
        raise AdapterMismatchError(f"{shortened(str(problem), 180)}; {'; '.join(why)}") from None


def base_manifest(base: Base, mode: Any) -> Manifest:
    """The manifest of the base graph in its current state, for a bundle of this mode."""
    return Manifest(
        task=base.task,
        mode=mode,
        base=base.identity,
        precision=base.precision,
        opset=opset_of(base.graph),
        inputs=required_inputs(base.graph),
        outputs=outputs(base.graph),
        padding=padding_of(base.graph),
        cache_in_place=updates_cache_in_place(base.graph),
        embeds=base.embeds,
        image_blocks=base.image_blocks,
        other_part=base.other_part,
        encoder=encoder_part(base),
        tower=base.tower,
        traced=base.traced,
        probabilities=base.probabilities,
        quantized_embedding=None if base.before is None else base.before.quantized_embedding,
        fixed_ranges=count_ranges(base.graph.graph),
    )


def encoder_part(base: Base) -> EncoderGraph | None:
    """The inputs and outputs of an encoder-decoder's encoder; None if it is not a separate part."""
    if base.task != SEQ2SEQ_LM:
        return None
    return encoder_of(required_inputs(base.graph), outputs(base.graph))


def with_quantized_weights(base: Base, manifest: Manifest, options: Options) -> Manifest:
    """Quantize the weights if the precision requires it; return the manifest.

    Raises:
        ExportError: the graph cannot be quantized as requested.
    """
    bits = PACKED_BITS.get(base.precision)
    if bits is not None and not base.quantized:
        logger.info("quantizing the weights to %s", base.precision)
        manifest = quantize(base.graph, manifest, bits)
    if not options.quantize_embedding or manifest.quantized_embedding is not None:
        return manifest
    if bits is None:
        raise ExportError(
            f"`quantize_embedding` is for int8 and int4, and the graph is in {base.precision}"
        )
    return quantize_embedding(base.graph, manifest)

"""Read an ONNX graph, of a file or a bundle, as the base of a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.files.base_files import base_tensors, check_no_peft_layers
from loradeploy.adapter.files.digest import base_digest
from loradeploy.adapter.modules.renamings import base_prefix_of, submodels_of
from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from loradeploy.bundle.fitting.fit import THIS_BUNDLE
from loradeploy.bundle.graph_form import BFLOAT16, DEFAULT_PRECISION, is_packed
from loradeploy.bundle.manifest import BaseIdentity, Manifest
from loradeploy.bundle.names import INPUTS_EMBEDS, PAST
from loradeploy.bundle.outputs import main_output
from loradeploy.errors import ExportError, UsageError
from loradeploy.export.bases.base import Base, Options, modules_of
from loradeploy.export.graph.file import TRACED_BY, graph_digest
from loradeploy.export.graph.halves import load_bundle_graph
from loradeploy.export.match.adapter_layers import refuse_adapter_products
from loradeploy.export.match.products import precision_of
from loradeploy.export.match.whole.norm_forms import annotate_forms, vectors_in
from loradeploy.export.passes.precision.bf16 import compute_as_float32, has_float32_weights
from loradeploy.export.passes.side_inputs.inject import remove_side_inputs
from loradeploy.export.passes.undo import remove_choices
from loradeploy.export.read.files.settings import settings_beside, ties_head
from loradeploy.export.read.files.source import Source
from loradeploy.export.read.half import name_encoder, other_half
from loradeploy.export.read.loaded import load_regular
from loradeploy.export.read.parts.joined import join_parts
from loradeploy.export.read.products.attention import separate_projections
from loradeploy.export.read.products.channels_first import features_last, matrices_of
from loradeploy.export.read.products.constant_weights import compute_weights
from loradeploy.export.read.products.later_calls import join_later_calls
from loradeploy.export.read.products.normalize import normalize_products
from loradeploy.export.read.regular import (
    complete_shapes,
)
from loradeploy.export.read.static_ranges import warn_of_ranges
from loradeploy.export.read.subgraphs import take_branches
from loradeploy.export.read.values.cache import complete_cache
from loradeploy.export.read.values.cache_position import compute_cache_position
from loradeploy.export.read.values.probabilities import Probabilities, add_logits
from loradeploy.export.read.values.value_names import check_mask, rename_values
from loradeploy.export.tasks import own_task, task_of_graph
from loradeploy.export.trace.cleanup.tidy import name_dimensions
from loradeploy.export.trial.bundle import TrialSource
from loradeploy.export.trial.original import Original
from loradeploy.paths import resolved
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

logger = logger_of(__name__)

_LISTED: Final = 4  # a graph's outputs in a message


def from_graph(source: Source, options: Options) -> Base:
    """Read an ONNX file, or a bundle's graph without its side inputs.

    Raises:
        ExportError: the graph has side inputs without a manifest, or does not support an option.
        UsageError: the bundle is merged, or the task is not known.
    """
    assert source.graph is not None
    if source.manifest is not None and source.manifest.mode == "merged":
        raise UsageError(
            f"{source.directory} is a merged bundle: give the base model or a side-input bundle"
        )
    logger.info("reading %s", source.graph)
    if source.manifest is None:
        base = _of_file(source, source.graph, options)
    else:
        base = _of_bundle(source, source.manifest, options)
    if options.evidence.checkpoint is not None:
        annotate_forms(base.graph, vectors_in(options.evidence.checkpoint).get)
    if options.task is not None and options.task != base.task:
        raise UsageError(f"the graph of {source.name} is for {base.task}, not for {options.task}")
    current, precision = base.precision, options.precision or base.precision
    packs = is_packed(precision) and current in ("fp32", "fp16")
    if precision != current and not packs and (current, precision) != ("fp32", "bf16"):
        raise ExportError(
            f"{source.name} is an ONNX graph in {current} and cannot be made {precision}: export"
            " the checkpoint instead"
        )
    return dataclasses.replace(
        base,
        precision=precision,
        quantized=precision == current,
        source=dataclasses.replace(base.source, quantized_here=precision != current),
    )


def _of_bundle(source: Source, manifest: Manifest, options: Options) -> Base:
    """A bundle's graph in its current precision, without its side inputs."""
    graph = load_bundle_graph(source.directory, manifest)
    compute_as_float32(graph.graph)
    complete_shapes(graph)
    remove_choices(graph, manifest)
    remove_side_inputs(graph, manifest)
    parameters = frozenset(saved.parameter for saved in manifest.saved)
    return Base(
        graph,
        manifest.task,
        manifest.base,
        manifest.precision,
        options.adapters,
        parameters=parameters,
        replaced=modules_of(parameters),
        lacking=frozenset(saved.parameter for saved in manifest.saved if saved.lacking),
        before=manifest,
        source=TrialSource(graph=source.graph),
        own_weights=manifest.own_weights,
        submodels=manifest.submodels,
        base_prefix=manifest.base_prefix,
        tower=manifest.tower,
        display_name=THIS_BUNDLE,
        embeds=manifest.embeds,
        image_blocks=manifest.image_blocks,
        other_part=manifest.other_part,
        traced=manifest.traced,
        probabilities=manifest.probabilities,
        problem_type=manifest.problem_type if manifest.task == TOKEN_CLASSIFICATION else None,
        ties_head=ties_head(settings_beside(source.directory, options.evidence.checkpoint)),
    )


def _of_file(source: Source, file: Path, options: Options) -> Base:
    """The graph of another exporter in its current precision, with products that can be named."""
    evidence = options.evidence
    config = settings_beside(source.directory, evidence.checkpoint)
    requested = _requested_task(options.task, config)
    renamed: dict[str, str] = {}
    made: Probabilities | None = None
    original: Original | None = None
    other: tuple[str, ...] = ()
    if source.parts is not None:
        joined = join_parts(source.parts, config)
        graph, original = joined.model, Original(joined.feeds, joined.outputs)
    else:
        graph = load_regular(file)
        renamed = rename_values(graph)
        compute_cache_position(graph.graph)
        take_branches(graph, file.parent, config)
        name_encoder(graph.graph, config)
        other = other_half(graph.graph, config)
        check_mask(graph, renamed, file.parent, config)
        made = add_logits(graph.graph, requested, config.get("problem_type"))
        renamed |= {} if made is None else made.renamed
    if graph.producer_name == TRACED_BY:
        graph.producer_name = None  # nothing shows that it was not changed since
    precision = precision_of(graph)
    if precision == BFLOAT16 and has_float32_weights(graph.graph):
        precision = DEFAULT_PRECISION  # weights in float32 keep their precision
    compute_as_float32(graph.graph)
    complete_shapes(graph)
    name_dimensions(graph)
    complete_cache(graph, source.directory, evidence.checkpoint)
    identity = _identity(source, graph, evidence.checkpoint)
    if evidence.checkpoint is not None or evidence.map is not None:
        separate_projections(graph.graph)  # the graph has no names for them
    compute_weights(graph.graph)
    features_last(graph.graph, matrices_of(options.adapters.values(), evidence.checkpoint))
    normalize_products(graph.graph)
    join_later_calls(graph.graph)
    refuse_adapter_products(graph.graph)
    complete_shapes(graph)  # after operators that inference did not know before
    warn_of_ranges(graph.graph)
    architectures, model_type = config.get("architectures"), str(config.get("model_type") or "")
    return Base(
        graph,
        _task_of(source, graph, requested, config),
        identity,
        precision,
        options.adapters,
        source=TrialSource(original=original, graph=file, renamed=renamed),
        submodels=submodels_of(str((architectures or [""])[0]), model_type),
        base_prefix=base_prefix_of(model_type),
        display_name="this ONNX model",
        other_part=other,
        probabilities=None if made is None else made.output,
        problem_type=None if made is None else made.problem_type,
        ties_head=ties_head(config),
    )


def _identity(source: Source, graph: ir.Model, checkpoint: Path | None) -> BaseIdentity:
    if checkpoint is None:
        return BaseIdentity(source.name, graph_digest(graph), "onnx")
    check_no_peft_layers(checkpoint, base_tensors(checkpoint))
    return BaseIdentity(resolved(checkpoint).name, base_digest(checkpoint), "checkpoint")


def _requested_task(task: str | None, config: Mapping[str, Any]) -> str | None:
    """The requested task, or token classification if the config declares it.

    The shapes of a token classifier's outputs are those of a language model.
    """
    classifies = task is None and own_task(config) == TOKEN_CLASSIFICATION
    return TOKEN_CLASSIFICATION if classifies else task


def _takes_tokens(graph: ir.Graph) -> bool:
    """Whether a graph has an input of tokens or of their embeddings, or a cache of them."""
    return any(
        str(value.name).startswith((PAST, INPUTS_EMBEDS))
        or (
            value.dtype is not None
            and value.dtype.is_integer()
            and not str(value.name).endswith("mask")
        )
        for value in graph.inputs
    )


def _task_of(
    source: Source, graph: ir.Model, requested: str | None, config: Mapping[str, Any]
) -> str:
    if source.parts is not None:
        return SEQ2SEQ_LM
    shapes = {str(value.name): value.shape for value in graph.graph.outputs}
    ranks = {name: None if shape is None else len(shape) for name, shape in shapes.items()}
    task = task_of_graph([str(value.name) for value in graph.graph.inputs], ranks) or requested
    if task == CAUSAL_LM and not _takes_tokens(graph.graph):
        task = None if requested == CAUSAL_LM else requested  # logits of frames of audio
        if task is None:
            raise UsageError(
                f"the graph of {source.name} takes no tokens, so that its logits are not those of"
                " a language model, but of frames of audio (CTC) or the like, and no task decodes"
                f" these: give `task={FEATURE_EXTRACTION!r}` to run it with AdapterSession.run"
            )
    if task == SEQUENCE_CLASSIFICATION and requested in (None, CAUSAL_LM):
        logits = shapes.get(main_output(task, ranks) or "")
        of_words = logits is not None and logits[-1] == config.get("vocab_size")
        if of_words and own_task(config) == CAUSAL_LM:
            task = CAUSAL_LM  # with the logits of the last position only
    cached = any(str(value.name).startswith(PAST) for value in graph.graph.inputs)
    if task == CAUSAL_LM and (
        requested == TOKEN_CLASSIFICATION or (requested == FEATURE_EXTRACTION and not cached)
    ):
        task = requested  # the outputs have the ranks of a language model's
    if task is None and (own := own_task(config)) is not None and main_output(own, ranks):
        task = own  # the outputs have other names
    if task is not None and main_output(task, ranks) is None:
        raise UsageError(
            f"none of the outputs of {source.name} is known to be what {task} gives:"
            f" {', '.join(list(ranks)[:_LISTED])}"
        )
    if task is None:
        raise UsageError(
            f"the inputs and outputs of {source.name} do not show its task: give `task`"
        )
    return task

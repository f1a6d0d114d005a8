"""Read an ONNX graph, of a file or a bundle, as the base of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.files.base_files import base_tensors, check_no_peft_layers
from loradeploy.adapter.files.digest import base_digest
from loradeploy.adapter.modules.renamings import Submodel, base_prefix_of, submodels_of
from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from loradeploy.bundle.fitting.fit import THIS_BUNDLE
from loradeploy.bundle.graph_form import BFLOAT16, DEFAULT_PRECISION, is_packed
from loradeploy.bundle.manifest import BaseIdentity
from loradeploy.bundle.names import INPUTS_EMBEDS, PAST
from loradeploy.bundle.outputs import main_output
from loradeploy.errors import ExportError, UsageError
from loradeploy.export.base import Base, Options, modules_of
from loradeploy.export.graph.file import graph_digest
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
from loradeploy.export.read.joined import join_parts
from loradeploy.export.read.loaded import load_regular
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
    renamed: dict[str, str] = {}
    made: Probabilities | None = None
    original: Original | None = None
    other: tuple[str, ...] = ()
    own = settings_beside(source.directory, options.evidence.checkpoint)
    if source.manifest is not None:
        graph = load_bundle_graph(source.graph.parent, source.manifest)
    elif source.parts is not None:
        joined = join_parts(source.parts, own)
        graph, original = joined.model, Original(joined.feeds, joined.outputs)
    else:
        graph = load_regular(source.graph)
        renamed = rename_values(graph)
        take_branches(graph, source.graph.parent, own)
        name_encoder(graph.graph, own)
        other = other_half(graph.graph, own)
        check_mask(graph, renamed, source.graph.parent, own)
        made = add_logits(graph.graph, _requested_task(options.task, own), own.get("problem_type"))
        renamed |= {} if made is None else made.renamed
    current = precision_of(graph) if source.manifest is None else source.manifest.precision
    if source.manifest is None and current == BFLOAT16 and has_float32_weights(graph.graph):
        current = DEFAULT_PRECISION  # weights in float32 keep their precision
    compute_as_float32(graph.graph)
    complete_shapes(graph)
    if source.manifest is not None:
        remove_choices(graph, source.manifest)
        remove_side_inputs(graph, source.manifest)
        identity, task = source.manifest.base, source.manifest.task
        other = source.manifest.other_part
        probabilities = source.manifest.probabilities
        problem_type = source.manifest.problem_type if task == TOKEN_CLASSIFICATION else None
        parameters = frozenset(saved.parameter for saved in source.manifest.saved)
        lacking = frozenset(s.parameter for s in source.manifest.saved if s.lacking)
        replaced = modules_of(parameters)
    else:
        probabilities = None if made is None else made.output
        problem_type = None if made is None else made.problem_type
        name_dimensions(graph)
        complete_cache(graph, source.directory, options.evidence.checkpoint)
        identity = _identity(source, graph, options.evidence.checkpoint)
        if options.evidence.checkpoint is not None or options.evidence.map is not None:
            separate_projections(graph.graph)  # the graph has no names for them
        compute_weights(graph.graph)
        known = matrices_of(options.adapters.values(), options.evidence.checkpoint)
        features_last(graph.graph, known)
        normalize_products(graph.graph)
        join_later_calls(graph.graph)
        refuse_adapter_products(graph.graph)
        complete_shapes(graph)  # after operators that inference did not know before
        warn_of_ranges(graph.graph)
        task = _task_of(source, graph, _requested_task(options.task, own), own)
        parameters = replaced = lacking = frozenset()
    if options.evidence.checkpoint is not None:
        annotate_forms(graph, vectors_in(options.evidence.checkpoint).get)
    if options.task is not None and options.task != task:
        raise UsageError(f"the graph of {source.name} is for {task}, not for {options.task}")
    precision = options.precision or current
    packs = is_packed(precision) and current in ("fp32", "fp16")
    if precision != current and not packs and (current, precision) != ("fp32", "bf16"):
        raise ExportError(
            f"{source.name} is an ONNX graph in {current} and cannot be made {precision}: export"
            " the checkpoint instead"
        )
    return Base(
        graph,
        task,
        identity,
        precision,
        options.adapters,
        quantized=precision == current,
        parameters=parameters,
        replaced=replaced,
        lacking=lacking,
        before=source.manifest,
        source=TrialSource(
            original=original,
            graph=source.graph,
            quantized_here=precision != current,
            renamed=renamed,
        ),
        own_weights={} if source.manifest is None else source.manifest.own_weights,
        submodels=_submodels(source, options.evidence.checkpoint),
        base_prefix=_base_prefix(source, options.evidence.checkpoint),
        tower=None if source.manifest is None else source.manifest.tower,
        display_name="this ONNX model" if source.manifest is None else THIS_BUNDLE,
        embeds=() if source.manifest is None else source.manifest.embeds,
        image_blocks=source.manifest is not None and source.manifest.image_blocks,
        other_part=other,
        traced=source.manifest is not None and source.manifest.traced,
        probabilities=probabilities,
        problem_type=problem_type,
        ties_head=ties_head(settings_beside(source.directory, options.evidence.checkpoint)),
    )


def _submodels(source: Source, checkpoint: Path | None) -> tuple[Submodel, ...]:
    """The submodels in the bundle's manifest, or the model of a graph's config.json."""
    if source.manifest is not None:
        return source.manifest.submodels
    config = settings_beside(source.directory, checkpoint)
    names = config.get("architectures") or [""]
    return submodels_of(str(names[0]), str(config.get("model_type") or ""))


def _base_prefix(source: Source, checkpoint: Path | None) -> str:
    if source.manifest is not None:
        return source.manifest.base_prefix
    config = settings_beside(source.directory, checkpoint)
    return base_prefix_of(str(config.get("model_type") or ""))


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
    if requested == TOKEN_CLASSIFICATION and task == CAUSAL_LM:
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

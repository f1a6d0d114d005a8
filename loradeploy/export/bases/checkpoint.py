"""Trace a Hugging Face checkpoint as the base of a bundle, and check the adapters for it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.files.base_files import base_tensors
from loradeploy.adapter.files.digest import base_digest
from loradeploy.adapter.fitting.fit import MOST_ROWS
from loradeploy.adapter.fitting.parts import own_part
from loradeploy.adapter.fitting.towers import tower_part
from loradeploy.adapter.fitting.vocabulary import (
    added_tokens,
    refuse_resized,
    warn_of_resize,
    without_added,
)
from loradeploy.adapter.heads import LABELED, label_parameters
from loradeploy.adapter.modules.renamings import known
from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    CLASSIFICATIONS,
    FEATURE_EXTRACTION,
    IMAGE_FEATURE_EXTRACTION,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    VISION_TOWER,
)
from loradeploy.bundle.graph_form import DEFAULT_PRECISION, TOKENS
from loradeploy.bundle.manifest import (
    BaseIdentity,
    TensorSpec,
)
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import INPUT_IDS
from loradeploy.bundle.sample import Sample
from loradeploy.errors import (
    ExportError,
    ModelError,
    UsageError,
    listed_names,
    prefixing_errors,
)
from loradeploy.export.adapters.given import (
    check_adapters,
    check_brought,
    label_count,
)
from loradeploy.export.adapters.own_weights import model_digests, without_copies_of_model
from loradeploy.export.bases.base import Base, Options, modules_of
from loradeploy.export.files.texts import check_recipe, is_embedding_model
from loradeploy.export.graph.file import outputs, required_inputs
from loradeploy.export.match.experts import annotate_experts
from loradeploy.export.match.linears import find_linears
from loradeploy.export.match.whole.layouts import annotate_layouts
from loradeploy.export.match.whole.norm_forms import annotate_forms
from loradeploy.export.passes.forms.static_shapes import static_specs
from loradeploy.export.passes.tokens.embeds import add_inputs_embeds, sample_embeds
from loradeploy.export.passes.tokens.image_blocks import join_image_blocks
from loradeploy.export.passes.tokens.mrope import add_mrope_positions, sample_positions
from loradeploy.export.read.files.source import Source
from loradeploy.export.read.finite import check_finite_checkpoint
from loradeploy.export.tasks import choose_task
from loradeploy.export.towers import TowerKind, tower_kind
from loradeploy.export.trial.bundle import TrialSource
from loradeploy.lora.base.formats import check_unquantized
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter
    from loradeploy.export.trial.original import Original

logger = logger_of(__name__)


@dataclass(frozen=True)
class _Plan:
    """What is traced, as the config, the adapters and the options determine it.

    `adapters`: with the modules of `kind`, the tower to export, None if the model has no towers.
    `labels`: the number of outputs of a classifier's head, None if the checkpoint determines it.
    `others`: the modules that another graph of a vision-language model has.
    """

    config: Mapping[str, Any]
    task: str
    kind: TowerKind | None
    identity: BaseIdentity
    adapters: Mapping[str, Adapter]
    labels: int | None
    others: tuple[str, ...]


@dataclass(frozen=True)
class _Loaded:
    """The PyTorch model as it is traced, and what is known of it before it is cast.

    `adapters`: without copies of the base's weights. `zeroed`: the parameters that the checkpoint
    lacks. `vocabulary`, `weights`, `own_weights`: as in `Base`.
    """

    model: Any
    adapters: Mapping[str, Adapter]
    zeroed: Collection[str]
    vocabulary: int | None
    own_weights: Mapping[str, str]
    weights: Mapping[str, NDArray[Any]] | None


def from_checkpoint(source: Source, options: Options) -> Base:
    """Trace a Hugging Face checkpoint.

    Raises:
        ModelError: the checkpoint is not a model for the task, or has weights that are not finite.
        AdapterError: an adapter is refused or does not fit.
    """
    from loradeploy.export.trace import trace
    from loradeploy.export.trace.loading.towers import tower_config
    from loradeploy.lora.submodels import submodels

    plan = _plan(source, options)
    precision = options.precision or DEFAULT_PRECISION
    loaded = _load(source, options, plan, precision)
    model, task = loaded.model, plan.task
    graph = trace(model, task)
    decodes = task == CAUSAL_LM and plan.others
    embeds = _add_embeds(graph, plan.config, task) if decodes else _Embeds()
    _check_rank(outputs(graph), task, type(model).__name__)
    _annotate(graph, model)
    original = _original(model, graph, task, loaded.adapters, embeds, options.fixed)
    return Base(
        graph,
        task,
        plan.identity,
        precision,
        loaded.adapters,
        parameters=frozenset(name for name, _ in model.named_parameters(remove_duplicate=False)),
        replaced=modules_of(loaded.zeroed),
        lacking=frozenset(loaded.zeroed),
        pad=model.config.pad_token_id if task == SEQUENCE_CLASSIFICATION else None,
        weights=loaded.weights,
        source=TrialSource(original, quantized_here=precision not in (DEFAULT_PRECISION, "fp16")),
        own_weights=loaded.own_weights,
        traced=True,
        submodels=known(submodels(model)),
        base_prefix=str(model.base_model_prefix),
        vocabulary=loaded.vocabulary,
        embeds=embeds.inputs,
        image_blocks=embeds.image_blocks,
        other_part=plan.others,
        tower=None if plan.kind is None else plan.kind.tower,
        config=None if plan.kind is None else tower_config(model),
    )


def _plan(source: Source, options: Options) -> _Plan:
    """Decide what is traced, and check the checkpoint's files and the adapters for it."""
    from loradeploy.export.trace.loading.image_text import other_part

    adapters = dict(options.adapters)
    trained_on = [adapter.config.base_model_name_or_path for adapter in adapters.values()]
    check_unquantized(source.directory, names=[source.name, *trained_on])
    config = model_config(source.directory, error=ModelError)
    task = _task_of(source, config, options)
    kind = tower_kind(config, task)
    if kind is None:  # towers compute the vector themselves, without pooling
        check_recipe([source.directory, *options.directories.values()], task)
    for name, adapter in adapters.items():
        with prefixing_errors(name):
            adapters[name] = tower_part(adapter, None if kind is None else kind.tower)
    identity = BaseIdentity(source.name, base_digest(source.directory), "checkpoint")
    check_finite_checkpoint(source.directory)
    labels = label_count(adapters) if task in CLASSIFICATIONS else None
    if labels is not None and not options.merge:
        labels = _with_own_head(labels, source, adapters)
    plan = _Plan(config, task, kind, identity, adapters, labels, other_part(config, task))
    return dataclasses.replace(plan, adapters=_fitting(source, options, plan))


def _load(source: Source, options: Options, plan: _Plan, precision: str) -> _Loaded:
    """Load the model in `precision`, with the weights that the adapters to merge replace."""
    from loradeploy.export.trace import load_model
    from loradeploy.export.trace.loading.file_memory import Scratch
    from loradeploy.export.trace.loading.float16 import to_float16

    adapters = plan.adapters
    logger.info("loading %s", source.name)
    brought = {name for a in adapters.values() for name in (*a.saved, *a.carried)}
    scratch = None if options.scratch is None else Scratch(options.scratch, precision)
    model, zeroed = load_model(
        source.directory, plan.task, labels=plan.labels, brought=brought, scratch=scratch
    )
    for name, adapter in adapters.items():
        check_brought(name, adapter, zeroed)
    if TOKENS in options.side_inputs:
        _check_takes_tokens(source, model, plan.task)
    vocabulary = _resize_vocabulary(model, adapters) if options.merge else None
    if zeroed:
        # With adapters, `check_brought` reports it.
        level = logging.INFO if adapters else logging.WARNING
        message = "not in the checkpoint, zeros in the graph until an adapter replaces it: %s"
        logger.log(level, message, listed_names(zeroed))
    adapters = without_copies_of_model(model, adapters, merge=options.merge)
    own_weights = {} if options.merge else model_digests(model)
    weights = None
    if precision == "fp16":
        weights = _float_weights(model) if options.merge else None
        model = to_float16(model)
    return _Loaded(model, adapters, zeroed, vocabulary, own_weights, weights)


def _task_of(source: Source, config: Mapping[str, Any], options: Options) -> str:
    """The task that is given or that the adapters or the model's config declare."""
    adapters = options.adapters.values()
    task = choose_task(config, options.task, adapters)
    declared = options.task or any(adapter.config.task_type for adapter in adapters)
    if task == CAUSAL_LM and not declared and is_embedding_model(source.directory):
        return FEATURE_EXTRACTION  # embedding models keep the architecture name of their decoder
    return task


def _check_takes_tokens(source: Source, model: Any, task: str) -> None:
    """Raise an error if rows of tokens cannot be side inputs of the model."""
    from loradeploy.lora.base.vocabulary import tied_by_config_alone

    if task == SEQ2SEQ_LM:
        raise UsageError(
            f"{source.name} is an encoder-decoder, whose tokens have no side inputs: merge adapters"
            f" with trained tokens, and export without {TOKENS!r}"
        )
    if (apart := tied_by_config_alone(model)) is not None:
        raise ModelError(
            f"{source.name}: its config.json ties {apart[0]} and {apart[1]}, and the checkpoint has"
            f" two weights: rows of tokens would differ from PEFT's, export without {TOKENS!r}"
        )


def _resize_vocabulary(model: Any, adapters: Mapping[str, Adapter]) -> int | None:
    """Resize `model` to the vocabulary of the adapter to merge; its size, None if unchanged."""
    from loradeploy.lora.base.vocabulary import resize_for, vocabulary_of

    ((name, adapter),) = adapters.items()
    before = vocabulary_of(model)
    size = resize_for(model, adapter)
    if before is not None and size is not None:
        warn_of_resize(name, before.size, size)
    return size


@dataclass(frozen=True)
class _Embeds:
    """The inputs with which a decoder reads images, and how their positions are computed.

    `image_blocks`: the positions of an image attend to each other. `mrope`: they have three
    dimensions.
    """

    inputs: tuple[TensorSpec, ...] = ()
    image_blocks: bool = False
    mrope: bool = False


def _add_embeds(graph: ir.Model, config: Mapping[str, Any], task: str) -> _Embeds:
    """Add the inputs with which the decoder of a vision-language model reads images."""
    from loradeploy.export.trace.loading.image_text import has_image_blocks, has_mrope

    inputs = add_inputs_embeds(graph)
    blocks = bool(inputs) and has_image_blocks(config)
    if blocks:
        join_image_blocks(graph)
    mrope = has_mrope(config, task)
    if mrope:
        inputs = (*inputs, add_mrope_positions(graph))
    return _Embeds(inputs, blocks, mrope)


def _original(
    model: Any,
    graph: ir.Model,
    task: str,
    adapters: Mapping[str, Adapter],
    embeds: _Embeds,
    fixed: Mapping[str, int],
) -> Original | None:
    """What PyTorch computes for an example, to compare the bundle with."""
    from loradeploy.export.trace import pytorch_outputs

    config = model.config
    specs = static_specs(required_inputs(graph), fixed)
    pad = getattr(config.get_text_config(), "pad_token_id", None)  # image models have none
    feeds = Sample(specs, config.to_dict(), pad=pad).feeds()
    fed = sample_embeds(embeds.inputs, feeds[INPUT_IDS]) if embeds.inputs else None
    if fed is not None and embeds.mrope:
        fed |= sample_positions(feeds[INPUT_IDS])
    names = [spec.name for spec in outputs(graph)]
    return pytorch_outputs(model, task, names, feeds, adapters, fed)


def _fitting(source: Source, options: Options, plan: _Plan) -> Mapping[str, Adapter]:
    """The adapters with the model's module names and without those of other graphs, checked.

    Raises:
        AdapterMismatchError: an adapter does not fit.
    """
    from loradeploy.export.trace import load_model
    from loradeploy.export.trace.loading.image_text import vision_part
    from loradeploy.lora.base.vocabulary import resize_for, vocabulary_of
    from loradeploy.lora.submodels import named_as_in

    task, adapters = plan.task, dict(plan.adapters)
    if not adapters:
        return adapters
    skeleton, _ = load_model(source.directory, task, labels=plan.labels, meta=True)
    adapters = {name: named_as_in(skeleton, each) for name, each in adapters.items()}
    for name, adapter in adapters.items():
        with prefixing_errors(name):
            adapters[name] = own_part(adapter, plan.others)
    if task == VISION_TOWER:
        skeleton = vision_part(skeleton)
    plain, tokens = dict(adapters), vocabulary_of(skeleton)
    in_parts = bool(plan.others) or plan.kind is not None
    for name, adapter in adapters.items():
        with prefixing_errors(name):
            if options.merge:
                resize_for(skeleton, adapter)
            elif tokens is not None and (in_parts or task == SEQ2SEQ_LM):
                refuse_resized(adapter, tokens)
            elif tokens is not None and added_tokens(adapter, tokens, MOST_ROWS):
                plain[name] = without_added(adapter, tokens)
    check_adapters(skeleton, plain, task=task, base=plan.identity, merge=options.merge)
    return adapters


def _annotate(graph: ir.Model, model: Any) -> None:
    """Write what only the model shows into metadata: forms and layouts of weights, experts."""
    from transformers.pytorch_utils import Conv1D

    from loradeploy.lora.experts import expert_parameters

    conv1d = {name: isinstance(module, Conv1D) for name, module in model.named_modules()}
    if any(conv1d.values()):
        annotate_layouts(find_linears(graph).linears, conv1d)
    norms = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    annotate_forms(
        graph, lambda name: norms[name].detach().float().numpy() if name in norms else None
    )
    of_experts = expert_parameters(model)
    experts = {n: p.detach().numpy() for n, p in model.named_parameters() if n in of_experts}
    annotate_experts(graph, experts)


def _check_rank(given: Iterable[TensorSpec], task: str, model: str) -> None:
    """Raise ExportError if the states of an image are feature maps, not one state per position."""
    for spec in given:
        if task == IMAGE_FEATURE_EXTRACTION and len(spec.shape) > 3:
            raise ExportError(
                f"{model} gives {spec.name} of {len(spec.shape)} dimensions for an image, which is"
                f" not supported: {task} is for transformers with a state for each patch"
            )


def _with_own_head(labels: int, source: Source, adapters: Mapping[str, Adapter]) -> int:
    """The number of outputs of a head for the base and for adapters with up to `labels` labels.

    The base's head has to have as many outputs as the traced model. It is kept if it has the most
    and the adapters' heads can be filled up to it; else it is left out, with a warning.
    """
    tensors = base_tensors(source.directory)
    own = max((t.shape[0] for name, t in tensors.items() if LABELED.fullmatch(name)), default=0)
    weights = [(a, name) for a in adapters.values() for name in label_parameters(a)]
    filled = all(name.removesuffix("weight") + "bias" in a.saved for a, name in weights)
    if own > labels and filled:
        return own
    if own not in (0, labels):
        logger.warning(
            "the base's own head has %d outputs and the adapters' up to %d: it is left out, and"
            " rows without an adapter are given zeros",
            own,
            labels,
        )
    return labels


def _float_weights(model: Any) -> dict[str, NDArray[Any]]:
    """The weights [out, in] of linear layers and embeddings in fp32, before the model is cast."""
    from transformers.pytorch_utils import Conv1D

    weights = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2:
            values = weight.detach().numpy()
            weights[name] = values.T if isinstance(module, Conv1D) else values
    return weights

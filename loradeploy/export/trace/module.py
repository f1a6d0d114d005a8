"""Trace a PyTorch model into an ONNX graph, for each kind of task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.tasks import (
    FEATURES,
    IMAGES,
    QUESTION_ANSWERING,
    SEQ2SEQ_LM,
    TASK_TABLE,
    Task,
)
from loradeploy.bundle.names import (
    ATTENTION_MASK,
    END_LOGITS,
    INPUT_FEATURES,
    INPUT_IDS,
    INPUTS_EMBEDS,
    PIXEL_VALUES,
    POOLER_OUTPUT,
    POSITION_IDS,
    TOKEN_TYPE_IDS,
    past_name,
    present_name,
)
from loradeploy.errors import ExportError, LoraDeployError
from loradeploy.export.trace import encoder_decoder
from loradeploy.export.trace.alike import alike_layers, shortened
from loradeploy.export.trace.checkpoint import root_cause
from loradeploy.export.trace.cleanup.tidy import tidy
from loradeploy.export.trace.image_text import has_image_blocks
from loradeploy.export.trace.lowering import lowered
from loradeploy.export.trace.patches import traceable, without_gc
from loradeploy.export.trace.repeat import extend
from loradeploy.export.trial.original import Original, run_module
from loradeploy.lora.quiet import quiet
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch.export import ExportedProgram

    from loradeploy.adapter.adapter import Adapter
    from loradeploy.bundle.sample import Feeds

logger = logger_of(__name__)

OPSET: Final = 23
# Every dynamic size of the example is at least 2, or torch.export would make it a constant.
_BATCH, _SEQUENCE, _PAST = 2, 3, 4
# An image in patches: more than one window, which torch.export would specialize on.
_ROWS, _COLUMNS = 17, 19
# Models with a pooled output, but without a pooler module.
_POOLS: Final = ("dinov2", "dinov2_with_registers")
WRAPPED: Final = "wrapped"  # the wrapper's attribute with the traced model
_Program = tuple["ExportedProgram", list[str], list[str]]  # with the names of inputs and outputs


@dataclass(frozen=True, eq=False)
class Cache:
    """The cache of one decoder layer: keys and values [batch, heads, past, head_dim]."""

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int


@without_gc()
def trace(model: torch.nn.Module, task: str) -> ir.Model:
    """Trace `model` into an optimized ONNX graph; batch, sequence and past are dynamic.

    Decoders: `input_ids`, `attention_mask`, `position_ids` if the model takes them, and the cache →
    `logits` [batch, sequence, vocabulary] and the cache. Encoders: `input_ids`, `attention_mask`,
    `token_type_ids` if the model has several types → `logits` [batch, labels], or
    `last_hidden_state` [batch, sequence, hidden] and, with a pooler, `pooler_output` [batch,
    hidden]. Token classifiers: `logits` [batch, sequence, labels]. Question answering:
    `start_logits` and `end_logits` [batch, sequence]. Image classifiers:
    `pixel_values` → `logits`. Encoders of images: `pixel_values` → `last_hidden_state` and
    `pooler_output`. Towers of two-tower models: the vector only (see `trace/towers.py`). Vision
    towers: `pixel_values` → `image_features` [images, tokens, hidden], with dynamic rows and
    columns for images in patches. Encoder-decoders: see `trace/encoder_decoder.py`.

    Raises:
        ExportError: torch.export or torch.onnx refuses the model.
    """
    import torch

    kind = TASK_TABLE[task]
    _check_positions(model)
    with quiet(), traceable(), torch.no_grad():
        try:
            logger.info("tracing %s with torch.export", type(model).__name__)
            program, names, outputs = _program(model, kind)
            logger.info("translating the trace to ONNX")
            with lowered(program):
                onnx_program = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=names,
                    output_names=outputs,
                    optimize=False,
                    verify=False,
                    verbose=False,
                )
        except Exception as problem:  # torch's exceptions have no common base class
            raise ExportError(
                f"{type(model).__name__} cannot be traced for {task}: {root_cause(problem)}"
                ": give an ONNX file that another exporter made of it"
            ) from problem
    if onnx_program is None:
        raise ExportError(f"torch.onnx gave no graph for {type(model).__name__}")
    logger.info("optimizing the graph")
    try:
        return tidy(onnx_program.model, prefix=WRAPPED)
    except (MemoryError, LoraDeployError):
        raise
    except Exception as problem:  # onnxscript's folding fails on an unknown operator
        raise ExportError(
            f"the graph that torch.onnx made of {type(model).__name__} cannot be optimized:"
            f" {root_cause(problem)}: give an ONNX file that another exporter made of it"
        ) from problem


def _program(model: Any, kind: Task) -> _Program:
    """Export `model`; return the program and the names of its inputs and outputs."""
    repeated = None if kind.name == SEQ2SEQ_LM else _repeated(model, kind)
    return _exported(model, kind) if repeated is None else repeated


def _repeated(model: Any, kind: Task) -> _Program | None:
    """As `_program`, from a trace of the first layers; None if all layers have to be traced."""
    layers = None
    try:
        layers = alike_layers(model)
        if layers is None:
            return None
        with shortened(model, layers):
            program, names, outputs = _exported(model, kind)
        extend(program, _wrapper(model, kind), f"{WRAPPED}.{layers.path}", layers.count)
    except Exception as problem:  # also of torch's internals, which other versions may change
        logger.debug("tracing all layers: %s: %s", type(problem).__name__, problem)
        if layers is not None and alike_layers(model) != layers:
            raise  # `model` was not restored
        return None
    if kind.cached:
        names = [*_plain_inputs(model, kind), *_each(past_name, layers.count)]
        outputs = [*_outputs(model, kind), *_each(present_name, layers.count)]
    return program, names, outputs


def _exported(model: Any, kind: Task) -> _Program:
    import torch

    wrapper = _wrapper(model, kind)
    arguments, dynamic, names, outputs = _example(model, kind)
    program = torch.export.export(wrapper, arguments, dynamic_shapes=dynamic, strict=False)
    return program, names, outputs


def _each(name: Callable[[int, str], str], layers: int) -> list[str]:
    """The names of the cache's tensors, layer by layer."""
    return [name(i, part) for i in range(layers) for part in ("key", "value")]


def _check_positions(model: torch.nn.Module) -> None:
    """Raise ExportError if rotary frequencies depend on the longest text so far."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        found = kinds.values() if isinstance(kinds, Mapping) else [kinds]
        if any("dynamic" in str(kind) for kind in found):
            longest = getattr(module, "original_max_seq_len", "max_position_embeddings")
            raise ExportError(
                f"{type(model).__name__} changes its rotary positions with the length of a text"
                " (rope_scaling of type dynamic), which cannot be exported: for texts of up to"
                f" {longest} tokens, where nothing is scaled, remove rope_scaling from"
                " config.json, or set the rope_type in rope_parameters to default"
            )


def pytorch_outputs(
    model: torch.nn.Module,
    task: str,
    names: Sequence[str],
    feeds: Feeds,
    adapters: Mapping[str, Adapter],
    embeds: Feeds | None,
) -> Original | None:
    """Compute the outputs `names` in PyTorch for `feeds`: see `original.run_module`.

    `embeds`: for a second run of a decoder, `inputs_embeds`, `inputs_embeds_mask`, and
    `mrope_position_ids` if it takes them.
    """
    kind = TASK_TABLE[task]
    fed = None if embeds is None else (_embedded(model, kind), {**feeds, **embeds})
    with quiet():
        return run_module(model, _wrapper(model, kind), names, feeds, adapters, fed)


def _embedded(model: Any, kind: Task) -> torch.nn.Module:
    """Wrap the decoder `model` to take embeddings instead of tokens, in its own way.

    After the decoder's plain inputs come `inputs_embeds` and `inputs_embeds_mask`, and optionally
    positions that replace `position_ids`.
    """
    import torch

    blocks = has_image_blocks(model.config.to_dict())
    wrapper = _wrapper(model, kind, INPUTS_EMBEDS, *([TOKEN_TYPE_IDS] if blocks else []))
    names = _plain_inputs(model, kind)

    class Embedded(torch.nn.Module):
        def forward(self, plain: Sequence[torch.Tensor], past: Any) -> Any:
            ids, *others = plain[: len(names)]
            given, places, *positions = plain[len(names) :]
            if positions:
                others[names.index(POSITION_IDS) - 1] = positions[0]
            own = model.get_input_embeddings()(ids)
            embeds = torch.where(places[..., None], given, own)
            types = [places.long()] if blocks else []  # 1 for an image
            return wrapper([embeds, *others, *types], past)

    return Embedded()


def _caches(model: Any) -> tuple[Cache, ...]:
    """The layout of the cache, from a run of two tokens, which works for every architecture."""
    import torch

    ids = torch.ones((1, 2), dtype=torch.int64)
    result = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    layers = getattr(getattr(result, "past_key_values", None), "layers", None)
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise ExportError(
            f"{type(model).__name__} keeps another state than keys and values per layer, which"
            " cannot be exported as a cache yet"
        )
    return tuple(
        Cache(
            key_heads=layer.keys.shape[1],
            key_size=layer.keys.shape[3],
            value_heads=layer.values.shape[1],
            value_size=layer.values.shape[3],
        )
        for layer in layers
    )


def _wrapper(model: Any, kind: Task, first: str | None = None, *besides: str) -> torch.nn.Module:
    """Wrap `model` as a module with positional tensors, in the order of `_example`.

    `first`: the name of the first tensor, if it is not the default. `besides`: the names of further
    tensors after the plain inputs.
    """
    import torch
    from transformers.cache_utils import DynamicCache

    if kind.name == SEQ2SEQ_LM:
        return encoder_decoder.wrapper(model)
    names, taken, outputs = _plain_inputs(model, kind), _parameters(model), _outputs(model, kind)
    if first is not None:
        names[0] = first
    names += besides
    # The fused rotary embedding needs positions for every row; a model's default has one row.
    rotates = POSITION_IDS in taken and (
        bool(getattr(model.config, "rope_parameters", None))
        or getattr(model.config, "position_embedding_type", None) == "rotary"  # ESM
    )

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = model

        def forward(
            self, plain: Sequence[torch.Tensor], past: Sequence[tuple[torch.Tensor, torch.Tensor]]
        ) -> tuple[torch.Tensor, ...]:
            cache = DynamicCache([(key, value) for key, value in past])
            feeds = dict(zip(names, plain, strict=True))
            result = self.wrapped(**feeds, past_key_values=cache, use_cache=True)
            present = (part for layer in cache.layers for part in (layer.keys, layer.values))
            return (result.logits, *present)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = model

        def forward(self, plain: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            feeds: dict[str, Any] = dict(zip(names, plain, strict=True))
            if "use_cache" in taken:
                feeds["use_cache"] = False
            if rotates:
                ids = plain[0]
                feeds[POSITION_IDS] = torch.zeros_like(ids) + torch.arange(ids.shape[1])
            result = self.wrapped(**feeds)
            return tuple(result[name] for name in outputs)

    return Decoder() if kind.cached else Encoder()


def _outputs(model: Any, kind: Task) -> list[str]:
    """The outputs of the model except the cache, including that of an encoder's pooler."""
    if (tower := getattr(model, "tower_kind", None)) is not None:
        return [tower.output]
    if kind.name == QUESTION_ANSWERING:
        return [kind.output, END_LOGITS]
    pools = getattr(model, "pooler", None) is not None or model.config.model_type in _POOLS
    pooled = kind.name in FEATURES and pools
    return [kind.output, POOLER_OUTPUT] if pooled else [kind.output]


def _plain_inputs(model: Any, kind: Task) -> list[str]:
    """The inputs of `model` except the cache."""
    taken = _parameters(model)
    if kind.name in IMAGES:
        return [PIXEL_VALUES]
    if (form := getattr(model, "text_form", None)) is not None:
        return list(form.inputs)
    names = [INPUT_IDS, ATTENTION_MASK]
    if kind.cached and POSITION_IDS in taken:
        names.append(POSITION_IDS)
    types = getattr(model.config, "type_vocab_size", None) or 0
    if not kind.cached and TOKEN_TYPE_IDS in taken and types > 1:
        names.append(TOKEN_TYPE_IDS)
    return names


def _example(
    model: Any, kind: Task
) -> tuple[tuple[Any, ...], tuple[Any, ...], list[str], list[str]]:
    """Example arguments, their dynamic dimensions, and the names of inputs and outputs."""
    import torch

    if kind.name == SEQ2SEQ_LM:
        fixed = _fixed_sizes(model.config, encoder_decoder.sources_of(model)[0])
        arguments, dynamic, names = encoder_decoder.example(model, fixed)
        layers = encoder_decoder.layers_of(names)
        given = encoder_decoder.output_names(layers, of_sound=fixed is not None)
        return arguments, dynamic, names, given
    caches = _caches(model) if kind.cached else ()
    outputs = _outputs(model, kind)
    outputs += _each(present_name, len(caches))
    batch, past = torch.export.Dim("batch"), torch.export.Dim("past")
    # AUTO lets torch.export find the limit: an encoder's positions end with their embedding table.
    total = torch.export.Dim.AUTO
    sequence = torch.export.Dim("sequence") if kind.cached else total
    dtype = next(model.parameters()).dtype
    ids = torch.ones((_BATCH, _SEQUENCE), dtype=torch.int64)
    past_length = _PAST if kind.cached else 0
    examples: Mapping[str, tuple[torch.Tensor, dict[int, Any]]] = {
        INPUT_IDS: (ids, {0: batch, 1: sequence}),
        ATTENTION_MASK: (
            torch.ones((_BATCH, past_length + _SEQUENCE), dtype=torch.int64),
            {0: batch, 1: total},
        ),
        POSITION_IDS: (
            torch.arange(past_length, past_length + _SEQUENCE)[None].repeat(_BATCH, 1),
            {0: batch, 1: sequence},
        ),
        TOKEN_TYPE_IDS: (torch.zeros_like(ids), {0: batch, 1: sequence}),
    }
    names = _plain_inputs(model, kind)
    if (form := getattr(model, "text_form", None)) is not None:
        full = torch.ones((_BATCH, form.length), dtype=torch.int64)
        examples = dict.fromkeys(form.inputs, (full, {0: batch}))
    patches = getattr(model, "patch_sizes", None)
    sizes = None if patches else _fixed_sizes(model.config, names[0])
    if patches:
        sizes_of = {"rows": _ROWS, "columns": _COLUMNS}
        rows, columns = (torch.export.Dim(name, min=least) for name, least in sizes_of.items())
        dims = {0: batch, 1: rows, 2: columns}
        image = torch.zeros(_BATCH, _ROWS, _COLUMNS, *patches, dtype=dtype)
        examples = {**examples, PIXEL_VALUES: (image, dims)}
    if sizes is not None:
        examples = {**examples, names[0]: (torch.zeros(_BATCH, *sizes, dtype=dtype), {0: batch})}
    plain = [examples[name][0] for name in names]
    plain_dims = [examples[name][1] for name in names]
    if not kind.cached:
        return (plain,), (plain_dims,), names, outputs
    make: Callable[..., torch.Tensor] = torch.ones
    cached = [
        (
            make((_BATCH, layer.key_heads, _PAST, layer.key_size), dtype=dtype),
            make((_BATCH, layer.value_heads, _PAST, layer.value_size), dtype=dtype),
        )
        for layer in caches
    ]
    cached_dims = [({0: batch, 2: past}, {0: batch, 2: past}) for _ in caches]
    names += _each(past_name, len(caches))
    return (plain, cached), (plain_dims, cached_dims), names, outputs


def _fixed_sizes(config: Any, name: str) -> tuple[int, ...] | None:
    """The sizes of an image or of audio features without the batch; None for other inputs."""
    if name == PIXEL_VALUES:
        config = getattr(config, "vision_config", config)
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.num_channels, height, width
    # Whisper's encoder has one position for two frames.
    return (
        (config.num_mel_bins, 2 * config.max_source_positions) if name == INPUT_FEATURES else None
    )


def _parameters(model: Any) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters

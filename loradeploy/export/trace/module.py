"""Trace a PyTorch model into an ONNX graph, for each kind of task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.tasks import SEQ2SEQ_LM, TASK_TABLE, Task
from loradeploy.bundle.names import past_name, present_name
from loradeploy.errors import ExportError, LoraDeployError
from loradeploy.export.trace.cleanup.tidy import tidy
from loradeploy.export.trace.example import example_of
from loradeploy.export.trace.loading.checkpoint import root_cause
from loradeploy.export.trace.patches import traceable, without_gc
from loradeploy.export.trace.program.alike import alike_layers, shortened
from loradeploy.export.trace.program.lowering import lowered
from loradeploy.export.trace.program.repeat import extend
from loradeploy.export.trace.signature import cache_names, main_outputs, plain_inputs
from loradeploy.export.trace.wrapper import WRAPPED, embedded, wrapper_of
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


@dataclass(frozen=True, eq=False)
class _Program:
    """What torch.export gave, with the names of the graph's inputs and outputs."""

    program: ExportedProgram
    inputs: list[str]
    outputs: list[str]


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
    `pooler_output`. Towers of two-tower models: the vector only (see `loading/towers.py`). Vision
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
            traced = _program(model, kind)
            logger.info("translating the trace to ONNX")
            with lowered(traced.program):
                onnx_program = torch.onnx.export(
                    traced.program,
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=traced.inputs,
                    output_names=traced.outputs,
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
    """Export `model` with torch.export."""
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
            traced = _exported(model, kind)
        extend(traced.program, wrapper_of(model, kind), f"{WRAPPED}.{layers.path}", layers.count)
    except Exception as problem:  # also of torch's internals, which other versions may change
        logger.debug("tracing all layers: %s: %s", type(problem).__name__, problem)
        if layers is not None and alike_layers(model) != layers:
            raise  # `model` was not restored
        return None
    if not kind.cached:
        return traced
    return _Program(
        traced.program,
        [*plain_inputs(model, kind), *cache_names(past_name, layers.count)],
        [*main_outputs(model, kind), *cache_names(present_name, layers.count)],
    )


def _exported(model: Any, kind: Task) -> _Program:
    import torch

    wrapper, example = wrapper_of(model, kind), example_of(model, kind)
    program = torch.export.export(
        wrapper, example.arguments, dynamic_shapes=example.dynamic, strict=False
    )
    return _Program(program, example.inputs, example.outputs)


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
    fed = None if embeds is None else (embedded(model, kind), {**feeds, **embeds})
    with quiet():
        return run_module(model, wrapper_of(model, kind), names, feeds, adapters, fed)

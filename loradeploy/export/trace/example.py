"""The example that a model is traced with, in which every dynamic size is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.tasks import SEQ2SEQ_LM, Task
from loradeploy.bundle.names import (
    ATTENTION_MASK,
    INPUT_FEATURES,
    INPUT_IDS,
    PIXEL_VALUES,
    POSITION_IDS,
    TOKEN_TYPE_IDS,
    past_name,
    present_name,
)
from loradeploy.errors import ExportError
from loradeploy.export.trace import encoder_decoder
from loradeploy.export.trace.signature import cache_names, main_outputs, plain_inputs

if TYPE_CHECKING:
    import torch

# Every dynamic size of the example is at least 2, or torch.export would make it a constant.
_BATCH, _SEQUENCE, _PAST = 2, 3, 4
# An image in patches: more than one window, which torch.export would specialize on.
_ROWS, _COLUMNS = 17, 19


@dataclass(frozen=True, eq=False)
class Example:
    """The `arguments` of a wrapper, their `dynamic` dimensions, and the graph's names."""

    arguments: tuple[Any, ...]
    dynamic: tuple[Any, ...]
    inputs: list[str]
    outputs: list[str]


@dataclass(frozen=True, eq=False)
class _Cache:
    """The cache of one decoder layer: keys and values [batch, heads, past, head_dim]."""

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int


# A tensor, and its dynamic dimensions by axis.
_Input = tuple["torch.Tensor", dict[int, Any]]


def example_of(model: Any, kind: Task) -> Example:
    """The example to trace `model` with.

    Raises:
        ExportError: it keeps another state than a cache of keys and values.
    """
    import torch

    if kind.name == SEQ2SEQ_LM:
        return _of_encoder_decoder(model)
    names = plain_inputs(model, kind)
    outputs = main_outputs(model, kind)
    batch = torch.export.Dim("batch")
    plain = _plain(model, kind, names, batch)
    tensors, dims = [tensor for tensor, _ in plain], [own for _, own in plain]
    if not kind.cached:
        return Example((tensors,), (dims,), names, outputs)
    caches = _caches(model)
    past, dtype = torch.export.Dim("past"), next(model.parameters()).dtype
    cached = [
        (
            torch.ones((_BATCH, layer.key_heads, _PAST, layer.key_size), dtype=dtype),
            torch.ones((_BATCH, layer.value_heads, _PAST, layer.value_size), dtype=dtype),
        )
        for layer in caches
    ]
    cached_dims = [({0: batch, 2: past}, {0: batch, 2: past}) for _ in caches]
    return Example(
        (tensors, cached),
        (dims, cached_dims),
        names + cache_names(past_name, len(caches)),
        outputs + cache_names(present_name, len(caches)),
    )


def _of_encoder_decoder(model: Any) -> Example:
    fixed = _fixed_sizes(model.config, encoder_decoder.sources_of(model)[0])
    arguments, dynamic, names = encoder_decoder.example(model, fixed)
    layers = encoder_decoder.layers_of(names)
    outputs = encoder_decoder.output_names(layers, of_sound=fixed is not None)
    return Example(arguments, dynamic, names, outputs)


def _plain(model: Any, kind: Task, names: Sequence[str], batch: Any) -> list[_Input]:
    """The inputs `names`, which are not of the cache."""
    import torch

    # AUTO lets torch.export find the limit: an encoder's positions end with their embedding table.
    total = torch.export.Dim.AUTO
    sequence = torch.export.Dim("sequence") if kind.cached else total
    dtype = next(model.parameters()).dtype
    ids = torch.ones((_BATCH, _SEQUENCE), dtype=torch.int64)
    past = _PAST if kind.cached else 0
    positions = torch.arange(past, past + _SEQUENCE)[None].repeat(_BATCH, 1)
    inputs: dict[str, _Input] = {
        INPUT_IDS: (ids, {0: batch, 1: sequence}),
        ATTENTION_MASK: (
            torch.ones((_BATCH, past + _SEQUENCE), dtype=torch.int64),
            {0: batch, 1: total},
        ),
        POSITION_IDS: (positions, {0: batch, 1: sequence}),
        TOKEN_TYPE_IDS: (torch.zeros_like(ids), {0: batch, 1: sequence}),
    }
    if (form := getattr(model, "text_form", None)) is not None:
        full = torch.ones((_BATCH, form.length), dtype=torch.int64)
        inputs = dict.fromkeys(form.inputs, (full, {0: batch}))
    if patches := getattr(model, "patch_sizes", None):
        sizes_of = {"rows": _ROWS, "columns": _COLUMNS}
        rows, columns = (torch.export.Dim(name, min=least) for name, least in sizes_of.items())
        image = torch.zeros(_BATCH, _ROWS, _COLUMNS, *patches, dtype=dtype)
        inputs[PIXEL_VALUES] = (image, {0: batch, 1: rows, 2: columns})
    elif (sizes := _fixed_sizes(model.config, names[0])) is not None:
        inputs[names[0]] = (torch.zeros(_BATCH, *sizes, dtype=dtype), {0: batch})
    return [inputs[name] for name in names]


def _caches(model: Any) -> tuple[_Cache, ...]:
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
        _Cache(
            key_heads=layer.keys.shape[1],
            key_size=layer.keys.shape[3],
            value_heads=layer.values.shape[1],
            value_size=layer.values.shape[3],
        )
        for layer in layers
    )


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

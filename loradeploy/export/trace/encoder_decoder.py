"""Wrap an encoder-decoder as one module to trace: its encoder, and its decoder with both caches.

Its graph has two halves that share nothing but weights (see `graph/halves.py`):

    encoder   the source → each decoder layer's cross-attention keys and values, and of audio also
              the encoder's hidden states, which onnxruntime-genai asks for
    decoder   the target's new tokens, those keys and values, and the self-attention cache → logits

The keys and values of the source are computed once, in the encoder's half, which has the decoder's
layers for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.names import (
    ATTENTION_MASK,
    CROSS,
    DECODER_INPUT_IDS,
    ENCODER_ATTENTION_MASK,
    ENCODER_HIDDEN_STATES,
    INPUT_FEATURES,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    SELF,
    past_name,
    present_name,
)
from loradeploy.errors import ExportError

if TYPE_CHECKING:
    import torch

# Every dynamic size of the example is at least 2, and independent ones differ.
_BATCH, _SOURCE, _TARGET, _PAST, _CROSS = 2, 5, 3, 4, 7
_PARTS: Final = ("key", "value")


def sources_of(model: Any) -> list[str]:
    """The inputs of the encoder."""
    of_sound = INPUT_FEATURES in inspect.signature(model.forward).parameters
    return [INPUT_FEATURES] if of_sound else [INPUT_IDS, ATTENTION_MASK]


def plain_inputs(model: Any) -> list[str]:
    """The inputs of both halves, except the caches."""
    mask = [] if INPUT_FEATURES in sources_of(model) else [ENCODER_ATTENTION_MASK]
    return [*sources_of(model), DECODER_INPUT_IDS, *mask]


def output_names(layers: int, *, of_sound: bool) -> list[str]:
    """The outputs of both halves."""
    caches = [present_name(i, p) for i, p in cache_parts(layers, SELF, CROSS, apart=True)]
    return [LOGITS, *caches, *([ENCODER_HIDDEN_STATES] if of_sound else [])]


def cache_parts(layers: int, *whose: str, apart: bool = False) -> Iterator[tuple[int, str]]:
    """The layer and part of every cached tensor: by layer, or first by cache if `apart`."""
    if apart:
        yield from ((i, f"{of}{p}") for of in whose for i in range(layers) for p in _PARTS)
    else:
        yield from ((i, f"{of}{p}") for i in range(layers) for of in whose for p in _PARTS)


def wrapper(model: Any) -> torch.nn.Module:
    """`model` as a module of positional tensors, in the order of `example`."""
    import torch
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    names, sources = plain_inputs(model), sources_of(model)
    # The fused rotary embedding needs positions for every row; a model's default has one row.
    rotates = hasattr(model.get_encoder(), "rotary_emb")

    class Halves(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = model

        def forward(
            self, plain: Sequence[torch.Tensor], past: Sequence[tuple[torch.Tensor, torch.Tensor]]
        ) -> tuple[torch.Tensor, ...]:
            feeds = dict(zip(names, plain, strict=True))
            source, crossed = self._cross({name: feeds[name] for name in sources})
            cache = EncoderDecoderCache(DynamicCache(past[::2]), DynamicCache(past[1::2]))
            cache.is_updated = dict.fromkeys(range(len(past) // 2), True)
            # The cross-attention cache is complete: only the shape of the states is used.
            keys = past[1][0]
            width = self.wrapped.get_encoder().config.hidden_size
            states = keys.new_zeros(keys.shape[0], keys.shape[2], width)
            result = self._decode(
                feeds[DECODER_INPUT_IDS], states, feeds.get(ENCODER_ATTENTION_MASK), cache
            )
            present = cache.self_attention_cache.layers
            hidden = [source] if INPUT_FEATURES in sources else []
            return (result.logits, *_tensors(present), *_tensors(crossed), *hidden)

        def _cross(self, source: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
            """The hidden states of a source, and its cross-attention cache.

            Decoding a first token computes the cache.
            """
            encoder = self.wrapped.get_encoder()
            if rotates:
                ids = source[INPUT_IDS]
                source = {
                    **source,
                    POSITION_IDS: torch.zeros_like(ids) + torch.arange(ids.shape[1]),
                }
            states = encoder(**source).last_hidden_state
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            mask = source.get(ATTENTION_MASK)
            first = torch.zeros((states.shape[0], 1), dtype=torch.int64)
            self._decode(first, states, mask, cache)
            return states, cache.cross_attention_cache.layers

        def _decode(
            self, ids: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None, cache: Any
        ) -> Any:
            others = {} if mask is None else {ATTENTION_MASK: mask}
            if rotates:
                steps = torch.arange(ids.shape[1]) + cache.get_seq_length()
                others[f"decoder_{POSITION_IDS}"] = torch.zeros_like(ids) + steps
            return self.wrapped(
                decoder_input_ids=ids,
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                past_key_values=cache,
                use_cache=True,
                **others,
            )

    return Halves()


def _tensors(layers: Sequence[Any]) -> Iterator[Any]:
    return (part for layer in layers for part in (layer.keys, layer.values))


def example(
    model: Any, source_sizes: tuple[int, ...] | None
) -> tuple[tuple[Any, ...], tuple[Any, ...], list[str]]:
    """Example arguments, their dynamic dimensions, and the names of the graph's inputs.

    `source_sizes`: the sizes of audio features without the batch; None for text.

    Raises:
        ExportError: the model's caches are not keys and values of target and source.
    """
    import torch

    Dim = torch.export.Dim
    batch, past, target, cross = Dim("batch"), Dim("past"), Dim.AUTO, Dim("source")
    sources = Dim("source_batch")  # the halves share no size
    dtype = next(model.parameters()).dtype
    caches = _caches(model, source_sizes)
    of_sound = source_sizes is not None
    source = Dim.AUTO
    ids = torch.ones((_BATCH, _SOURCE), dtype=torch.int64)
    plain: dict[str, tuple[torch.Tensor, dict[int, Any]]] = {
        INPUT_IDS: (ids, {0: sources, 1: source}),
        ATTENTION_MASK: (ids, {0: sources, 1: source}),
        DECODER_INPUT_IDS: (ids[:, :_TARGET].clone(), {0: batch, 1: target}),
        ENCODER_ATTENTION_MASK: (
            torch.ones((_BATCH, _CROSS), dtype=torch.int64),
            {0: batch, 1: cross},
        ),
    }
    if source_sizes is not None:
        plain[INPUT_FEATURES] = (torch.zeros(_BATCH, *source_sizes, dtype=dtype), {0: sources})
    names = plain_inputs(model)
    cached, cached_dims = [], []
    for own, crossed in caches:
        for parts, length, dims in (
            (own, _PAST, {0: batch, 2: past}),
            (crossed, crossed[0].shape[2] if of_sound else _CROSS, {0: batch, 2: cross}),
        ):
            if of_sound and parts is crossed:
                dims = {0: batch}
            cached.append(
                tuple(
                    torch.ones((_BATCH, part.shape[1], length, part.shape[3]), dtype=dtype)
                    for part in parts
                )
            )
            cached_dims.append((dims, dims))
    names_of_past = [past_name(i, part) for i, part in cache_parts(len(caches), SELF, CROSS)]
    arguments = ([plain[name][0].clone() for name in names], cached)
    dynamic = ([plain[name][1] for name in names], cached_dims)
    return arguments, dynamic, [*names, *names_of_past]


def layers_of(names: Sequence[str]) -> int:
    """The number of decoder layers with caches among the inputs `names`."""
    return sum(name.endswith(f"{CROSS}key") for name in names)


def _caches(model: Any, source_sizes: tuple[int, ...] | None) -> list[tuple[Any, Any]]:
    """Each layer's keys and values of the target and of the source, from a small run."""
    import torch
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    ids = torch.ones((1, 2), dtype=torch.int64)
    dtype = next(model.parameters()).dtype
    source = (
        {INPUT_IDS: ids, ATTENTION_MASK: ids}
        if source_sizes is None
        else {INPUT_FEATURES: torch.zeros((1, *source_sizes), dtype=dtype)}
    )
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    model(**source, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
    pairs = list(
        zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=False)
    )
    found = [((a.keys, a.values), (b.keys, b.values)) for a, b in pairs]
    if not found or any(part is None for pair in found for parts in pair for part in parts):
        raise ExportError(
            f"{type(model).__name__} keeps another state than keys and values of the target and the"
            " source per layer, which cannot be exported as a cache yet"
        )
    return found

"""The last layer of a decoder, computed only where the loss needs its output, on a CPU.

There the layer still needs the keys and values of all tokens of the example, but of other tokens
neither queries nor the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loradeploy.lora.layers.low_rank import LowRankLayer
from loradeploy.lora.quiet import quiet
from loradeploy.train.data.packing import (
    PACKED,
    STARTS,
    packed_logits,
    same_logits,
    trial_examples,
)
from loradeploy.train.fusion.attention import Attention
from loradeploy.train.fusion.layers import is_hooked

_PARTS: Final = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
# In the trial: the last example has none.
_TRIED: Final = (1, 4, 5, 9, 13)


class _LastLayer:
    """The forward pass of a layer of attention and an MLP, each after a norm and with a residual.

    `at` int64 [some]: the positions of the tokens in the packed row whose output is computed, in
    ascending order; None: all.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.own = layer.forward
        self.at: Tensor | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        """The output [1, tokens, size] of the layer, or [1, some, size]."""
        layer, attention = self.layer, self.layer.self_attn.forward
        # A checkpointed layer is called a second time in the backward pass.
        checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
        if (
            self.at is None
            or checkpointed
            or is_hooked(layer.self_attn)
            or STARTS not in options
            or attention_mask is not None
            or not attention.is_plain(hidden_states, position_embeddings, past_key_values, options)
        ):
            return self.own(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **options,
            )
        normed = layer.input_layernorm(hidden_states)
        attended, _ = attention.attended(normed, position_embeddings, None, options, self.at)
        x = hidden_states.index_select(1, self.at) + attended
        return x + layer.mlp(layer.post_attention_layernorm(x))


_LAST: Final[WeakKeyDictionary[nn.Module, _LastLayer]] = WeakKeyDictionary()


def shorten(model: PreTrainedModel) -> bool:
    """Prepare the last layer of `model` for `output_at`, if a trial of packed examples succeeds.

    Call it after `fuse` and `enable_packing`. Returns whether the layer is prepared.
    """
    if model in _LAST:
        return True
    layers: list[Any] = [module for module in model.modules() if _is_layer(module)]
    if not layers or model.config._attn_implementation != PACKED:
        return False
    layer = layers[-1]
    _LAST[model] = layer.forward = _LastLayer(layer)
    with quiet(), suppress(Exception):  # any exception means that the model does not support it
        examples = trial_examples(model)
        with _training(model):
            expected = packed_logits(model, examples)[:, _TRIED]
            with output_at(model, torch.tensor(_TRIED)):
                found = packed_logits(model, examples)
        if found.shape == expected.shape and same_logits(model, found, expected):
            return True
    del _LAST[model], layer.forward
    return False


@contextmanager
def output_at(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Inside the context, packed batches have outputs only at `positions`, if this is prepared.

    `positions`: int64 [some], ascending; the hidden states after the last layer are then
    [1, some, size] instead of [1, tokens, size].
    """
    last = _LAST.get(model)
    if last is None or not len(positions):
        yield
        return
    last.at = positions
    try:
        yield
    finally:
        last.at = None


@contextmanager
def _training(model: PreTrainedModel) -> Iterator[None]:
    """Inside the context, `model` is as in training, but without the adapter's dropout.

    A dropout of the model makes any two of its outputs differ, so that a trial shows it: one
    between the parts of a layer, such as StableLM's, would be skipped.
    """
    training = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, LowRankLayer):
            module.eval()
    try:
        yield
    finally:
        model.train(training)


def _is_layer(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in _PARTS]
    if "forward" in vars(module) or not all(isinstance(part, nn.Module) for part in parts):
        return False
    return isinstance(cast(Any, parts[1]).forward, Attention)

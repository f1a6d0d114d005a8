"""The projections and rotations of an attention module in few passes, for training on a CPU.

The attention function itself, its scaling and its further options stay the module's: they are
recorded when the module is compared with the function here, on random inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from loradeploy.train.data.packing import QUERIES
from loradeploy.train.fusion.elementwise import rotated
from loradeploy.train.fusion.layers import outputs

_RECORDED: Final = "loradeploy_recorded"
_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj")
# The trial's inputs: their scale, and the number of tokens. A limit of the projections, such as
# OLMo's `clip_qkv`, shows at the largest scale.
_TRIED: Final = ((1e-3, 3), (1.0, 1), (30.0, 7), (1e4, 3))
# Relative to the largest value, the two sides differ only by rounding.
_SAME: Final = 1e-5

Attend = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True, eq=False)
class Attention:
    """The forward pass of an attention module that rotates its queries and keys.

    `constants`: the options that the module passes on to its attention function beside those of a
    call, such as the scaling. `own`: its original forward pass. `named`: the options that it takes
    by name and may use itself, such as Ministral 3's `position_ids`.
    """

    module: Any
    constants: Mapping[str, Any]
    own: Callable[..., Any]
    named: frozenset[str]

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        """The output of the module, and its attention weights."""
        if not self.is_plain(hidden_states, position_embeddings, past_key_values, options):
            return self.own(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **options,
            )
        return self.attended(hidden_states, position_embeddings, attention_mask, options)

    def attended(
        self,
        hidden: Tensor,
        turns: tuple[Tensor, Tensor],
        mask: Tensor | None,
        options: Mapping[str, Any],
        queries: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """The output for `hidden` [batch, tokens, size]: [batch, tokens, size].

        `turns`: cosines and sines [batch or 1, tokens, head size]. `queries` int64 [some]: the
        positions of the tokens in a packed row whose output is computed; None: all.
        """
        module, some = self.module, {}
        if queries is None:
            q, k, v = outputs(hidden, [getattr(module, name) for name in _PROJECTIONS])
            turns_of_q = turns
        else:
            q = module.q_proj(hidden.index_select(1, queries))
            k, v = outputs(hidden, [module.k_proj, module.v_proj])
            turns_of_q = turns[0][:, queries], turns[1][:, queries]
            some = {QUERIES: queries}
        q = rotated(self._heads(q), *turns_of_q).transpose(1, 2)
        k = rotated(self._heads(k), *turns).transpose(1, 2)
        v = self._heads(v).transpose(1, 2)
        attend = cast(Attend, _attend(module))
        y, weights = attend(module, q, k, v, mask, **self.constants, **options, **some)
        return module.o_proj(y.flatten(-2)), weights

    def is_plain(self, hidden: Tensor, turns: Any, past: Any, options: Mapping[str, Any]) -> bool:
        """Whether a call is like those that were compared: float32, on a CPU, without a cache."""
        return (
            past is None
            and isinstance(turns, tuple)
            and turns[0].shape[-1] == self.module.head_dim  # Nemotron rotates a part of each head
            and hidden.device.type == "cpu"
            and hidden.dtype == turns[0].dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and self.named.union(self.constants).isdisjoint(options)
            and _attend(self.module) is not None
        )

    def _heads(self, y: Tensor) -> Tensor:
        return y.view(*y.shape[:-1], -1, self.module.head_dim)


def recorded(module: nn.Module) -> Attention | None:
    """`module` as an Attention if it computes the same in training; else None."""
    parts = [getattr(module, name, None) for name in (*_PROJECTIONS, "o_proj")]
    if not all(type(part) is nn.Linear and part.weight.device.type == "cpu" for part in parts):
        return None
    size, width = getattr(module, "head_dim", None), cast(nn.Linear, parts[0]).in_features
    training = module.training
    module.train()
    try:
        with torch.no_grad(), _recording(module) as calls:
            return _trial(module, cast(int, size), width, calls)
    except Exception:  # another kind of module may raise anything
        return None
    finally:
        module.train(training)


def _attend(module: Any) -> Attend | None:
    """The attention function of the model; None for the module's own ("eager")."""
    return cast("Attend | None", AttentionInterface().get(module.config._attn_implementation))


@dataclass(eq=False)
class _Calls:
    """The arguments of the last call of the recording attention function."""

    tensors: tuple[Tensor | None, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@contextmanager
def _recording(module: Any) -> Iterator[_Calls]:
    calls = _Calls()

    def record(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        calls.tensors, calls.options = (q, k, v, mask), options
        groups = q.shape[1] // k.shape[1]
        y = q + (k * v).repeat_interleave(groups, dim=1)
        return y.transpose(1, 2).contiguous(), None

    before = module.config._attn_implementation
    AttentionInterface.register(_RECORDED, record)
    module.config._attn_implementation = _RECORDED
    try:
        yield calls
    finally:
        module.config._attn_implementation = before
        AttentionInterface._global_mapping.pop(_RECORDED)


def _trial(module: Any, size: int, width: int, calls: _Calls) -> Attention | None:
    generator = torch.Generator().manual_seed(0)
    attention: Attention | None = None
    named = frozenset(inspect.signature(module.forward).parameters)
    for scale, tokens in _TRIED:
        x = scale * torch.randn((1, tokens, width), generator=generator)
        angles = torch.randn((1, tokens, size), generator=generator)
        turns = angles.cos(), angles.sin()
        given = {"given": object()}
        expected, _ = module(
            hidden_states=x, position_embeddings=turns, attention_mask=None, **given
        )
        tensors, options = calls.tensors, calls.options
        if tensors[3] is not None or options.pop("given") is not given["given"]:
            return None
        if options.get("dropout", 0.0) or any(isinstance(v, Tensor) for v in options.values()):
            return None  # the options of another call may differ
        if attention is not None and options != attention.constants:
            return None
        attention = Attention(module, options, module.forward, named)
        y, _ = attention.attended(x, turns, None, {})
        for ours, theirs in zip((*calls.tensors[:3], y), (*tensors[:3], expected), strict=True):
            ours, theirs = cast(Tensor, ours), cast(Tensor, theirs)
            limit = _SAME * float(theirs.abs().max())
            if not torch.allclose(ours, theirs, rtol=0, atol=limit):
                return None
    return attention

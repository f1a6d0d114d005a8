"""Patch torch and transformers while a model is traced, and restore them afterwards."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from loradeploy.export.trace.architectures import deberta, gpt_neo, m2m_100

if TYPE_CHECKING:
    import torch

# transformers' names of the implementations of experts that are replaced.
_EXPERTS: Final = ("grouped_mm", "batched_mm")


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Disable the garbage collector, which would scan a trace's many objects repeatedly.

    None of the objects has weights, so that little memory is freed late.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Make transformers' modules trace into a graph that fits the runtime.

    - Conv1D becomes a MatMul on its unflattened input, so that the batch axis is kept; transformers
      flattens the input for addmm.
    - No row of an attention mask is empty: padding attends to itself. Kernels that give NaN for an
      empty row would otherwise spread it from padding to all positions.
    - Grouped-query attention stays grouped: the repeated keys and values are not computed.
      Attention that relies on broadcasting instead is marked as grouped.
    - A mixture computes every expert for every token. ONNX has no operators to sort tokens by
      expert, as transformers does, and gathering weights by token would copy them for each token.
    - DeBERTa's positions are repeated for each row before its heads are split (deberta.py).
    - GPT-Neo's mask is computed from positions, not sliced from a table (gpt_neo.py).
    - M2M-100's table of positions does not grow with a text (m2m_100.py).
    - BART and its relatives limit the states in fp16 at every run, not only after an overflow.
    """
    import torch
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention
    from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
    from transformers.pytorch_utils import Conv1D

    conv1d_forward = Conv1D.forward
    scores_of_positions = DisentangledSelfAttention.disentangled_attention_bias
    attend = GPTNeoSelfAttention._attn
    positions = M2M100SinusoidalPositionalEmbedding.forward
    grouped = os.environ.get("TRANSFORMERS_SDPA_FORCE_GQA")
    attention = torch.nn.functional.scaled_dot_product_attention
    isfinite = torch.isfinite
    torch.isfinite = _never_finite(isfinite)
    Conv1D.forward = _conv1d_as_matmul
    DisentangledSelfAttention.disentangled_attention_bias = deberta.scores_of_positions
    GPTNeoSelfAttention._attn = gpt_neo.attend
    M2M100SinusoidalPositionalEmbedding.forward = m2m_100.positions
    torch.nn.functional.scaled_dot_product_attention = _grouped(attention)
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _mask_without_empty_rows
    for name in _EXPERTS:
        ALL_EXPERTS_FUNCTIONS[name] = _every_expert
    os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = "1"
    try:
        yield
    finally:
        Conv1D.forward = conv1d_forward
        DisentangledSelfAttention.disentangled_attention_bias = scores_of_positions
        GPTNeoSelfAttention._attn = attend
        M2M100SinusoidalPositionalEmbedding.forward = positions
        torch.nn.functional.scaled_dot_product_attention = attention
        torch.isfinite = isfinite
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        for name in _EXPERTS:
            del ALL_EXPERTS_FUNCTIONS[name]
        if grouped is None:
            del os.environ["TRANSFORMERS_SDPA_FORCE_GQA"]
        else:
            os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = grouped


def _grouped(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def grouped(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
    ) -> torch.Tensor:
        if query.ndim == 4 and query.shape[1] != key.shape[1]:
            options["enable_gqa"] = True
        return attention(query, key, value, *rest, **options)

    return grouped


class _Overflow:
    """The result of torch.isfinite if some number may be infinite."""

    def all(self) -> bool:
        return False


def _never_finite(isfinite: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """torch.isfinite for `if not isfinite(x).all(): x = clamp(x)`, with the clamp in the graph.

    It only changes numbers that are within 1000 of the largest one of fp16, or beyond it.
    """
    import torch

    def patched(x: torch.Tensor) -> torch.Tensor | _Overflow:
        return _Overflow() if x.dtype is torch.float16 else isfinite(x)

    return patched


def _every_expert(
    self: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Compute all experts for x [tokens, hidden], and add them with their weights.

    `chosen`, `weights` [tokens, k]: the selected experts of each token, and their weights.
    """
    import torch

    share = torch.zeros(x.shape[0], self.num_experts, dtype=weights.dtype)
    share = share.scatter(1, chosen, weights)  # [tokens, experts]
    up = "gate_up_proj" if self.has_gate else "up_proj"
    y = _by_expert(self, up, x[None])
    y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
    y = _by_expert(self, "down_proj", y)  # [experts, tokens, hidden]
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    return (y * share.T[..., None]).sum(dim=0).to(x.dtype)


def _by_expert(module: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)
    y: torch.Tensor = x @ (weight if module.is_transposed else weight.transpose(1, 2))
    return y + getattr(module, f"{name}_bias")[:, None] if module.has_bias else y


def _conv1d_as_matmul(self: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = x @ self.weight + self.bias  # [..., in] @ [in, out]
    return y


def _mask_without_empty_rows(
    *,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None = None,
    kv_offset: int = 0,
    use_vmap: bool = False,
    **rest: Any,
) -> Any:
    """transformers' sdpa_mask, which is never skipped, and applies padding by broadcasting."""
    from transformers import masking_utils

    rest.pop("allow_is_causal_skip", None)
    rest.pop("allow_is_bidirectional_skip", None)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and not use_vmap:
        causal = mask_function is not masking_utils.bidirectional_mask_function
        mask_function = masking_utils.and_masks(mask_function, _seen(padding, causal))
        padding = None
    return masking_utils.sdpa_mask(
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=padding,
        use_vmap=use_vmap,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **rest,
    )


def _seen(padding: torch.Tensor, causal: bool) -> Callable[..., Any]:
    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        valid = padding[:, None, None, :].bool()  # [batch, 1, 1, total]
        return valid | (query == key) if causal else valid

    return seen

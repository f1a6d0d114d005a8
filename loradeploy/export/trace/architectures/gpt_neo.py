"""GPT-Neo's attention, in a form without its table of the causal mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def attend(
    self: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute GPTNeoSelfAttention._attn: the result, and weights [batch, heads, queries, keys].

    transformers slices its mask from a table [positions, positions], by which torch.export bounds
    the sum of two dynamic lengths. Here the mask is computed from the positions.

    `query`: [batch, heads, queries, size]. `key`, `value`: [batch, heads, keys, size].
    """
    import torch

    queries, keys = query.shape[-2], key.shape[-2]
    columns = torch.arange(keys)
    rows = (torch.arange(queries) + (keys - queries))[:, None]
    seen = columns <= rows
    if self.attention_type == "local":
        seen = seen & (columns > rows - self.config.window_size)
    scores = query.float() @ key.float().transpose(-1, -2)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1).to(value.dtype)
    return weights @ value, weights

"""DeBERTa's attention to relative positions, in a form in which each row can have an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def scores_of_positions(
    self: Any,
    query_layer: torch.Tensor,
    key_layer: torch.Tensor,
    relative_pos: torch.Tensor | None,
    rel_embeddings: torch.Tensor,
    scale_factor: int,
) -> torch.Tensor:
    """Compute DebertaV2's disentangled_attention_bias, [batch · heads, queries, keys].

    Positions are projected once for all rows, [1, span, hidden], and repeated for each row before
    the heads are split, not after, so that an update that differs by row can be added in between.

    `query_layer`, `key_layer`: [batch · heads, queries or keys, size].
    """
    import torch
    from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta

    heads, span = self.num_attention_heads, self.pos_ebd_size
    if relative_pos is None:
        relative_pos = deberta.build_relative_position(
            query_layer,
            key_layer,
            bucket_size=self.position_buckets,
            max_position=self.max_relative_positions,
        )
    while relative_pos.dim() < 4:
        relative_pos = relative_pos.unsqueeze(0 if relative_pos.dim() == 2 else 1)
    relative_pos = relative_pos.long()
    positions = rel_embeddings[0 : span * 2, :].unsqueeze(0)  # [1, span, hidden]
    rows = query_layer.size(0) // heads

    def projected(kind: str) -> torch.Tensor:
        prefix = "" if self.share_att_key else "pos_"
        y = getattr(self, f"{prefix}{kind}_proj")(positions)
        split: torch.Tensor = self.transpose_for_scores(y.expand(rows, -1, -1), heads)
        return split  # [batch · heads, span, size]

    def gathered(scores: torch.Tensor, at: torch.Tensor, queries: int) -> torch.Tensor:
        index = at.clamp(0, span * 2 - 1).squeeze(0)
        return scores.gather(-1, index.expand(query_layer.size(0), queries, at.size(-1)))

    total = torch.zeros((), dtype=query_layer.dtype)
    if "c2p" in self.pos_att_type:
        keys = projected("key")
        scores = torch.bmm(query_layer, keys.transpose(-1, -2))
        scores = gathered(scores, relative_pos + span, query_layer.size(1))
        total = total + scores / deberta.scaled_size_sqrt(keys, scale_factor).to(scores.dtype)
    if "p2c" in self.pos_att_type:
        queries = projected("query")
        reverse = deberta.build_rpos(
            query_layer,
            key_layer,
            relative_pos,
            self.max_relative_positions,
            self.position_buckets,
        )
        scores = torch.bmm(key_layer, queries.transpose(-1, -2))
        scores = gathered(scores, span - reverse, key_layer.size(-2)).transpose(-1, -2)
        total = total + scores / deberta.scaled_size_sqrt(queries, scale_factor).to(scores.dtype)
    return total

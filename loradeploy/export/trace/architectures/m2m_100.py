"""M2M-100's sinusoidal positions, also NLLB's, from a table that does not grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def positions(
    self: Any,
    input_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    past_key_values_length: int = 0,
) -> torch.Tensor:
    """Compute M2M100SinusoidalPositionalEmbedding.forward: [batch, sequence, hidden].

    transformers compares the length of a text with its table, and makes a larger one, by which
    torch.export bounds the length. The table has all positions that the runtime allows.
    """
    first = self.padding_idx, past_key_values_length
    if input_ids is None:
        assert inputs_embeds is not None
        ids = self.create_position_ids_from_inputs_embeds(inputs_embeds, *reversed(first))
    else:
        ids = self.create_position_ids_from_input_ids(input_ids, *first)
    found: torch.Tensor = self.weights[ids]
    return found

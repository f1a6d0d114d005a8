"""How many tokens a model has positions for, as its configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# What architectures call it; the first that is there counts.
_NAMES: Final = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)
# Models that count positions from the padding's id on, so that the first ones are no text's.
FROM_PADDING_ON: Final = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl")
_PADDING: Final = 1  # their padding's id where the configuration does not say


def context_length(config: Mapping[str, Any]) -> int | None:
    """The most tokens, prompt and generated, that the model of `config` has positions for.

    `config`: the object in config.json; that of the text part counts where there are several.
    None where it does not say. A value below 1 leaves no position for a token.
    """
    text = config.get("text_config")
    found = _named(text) if isinstance(text, Mapping) else None
    settings: Mapping[str, Any] = config if found is None or text is None else text
    positions = _named(config) if found is None else found
    if positions is None or settings.get("model_type") not in FROM_PADDING_ON:
        return positions
    padding = settings.get("pad_token_id")
    return positions - 1 - (padding if type(padding) is int else _PADDING)


def _named(config: Mapping[str, Any]) -> int | None:
    values = (config.get(name) for name in _NAMES)
    return next((value for value in values if type(value) is int), None)

"""The configuration of a model in config.json, and its context length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.bundle.names import CONFIG_NAME
from loradeploy.errors import BundleError, LoraDeployError
from loradeploy.files import optional_json

# Names of the field in different architectures, in order of precedence.
_NAMES: Final = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)
# Models whose positions start after the id of the padding token, so that the first ones are unused.
FROM_PADDING_ON: Final = (
    *("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm"),
    *("data2vec-text", "ibert", "mpnet", "xmod"),
)
_SWITCHING: Final = ("longrope", "su")
_ORIGINAL: Final = "original_max_position_embeddings"
# transformers' defaults; for other models it is the maximum number of positions, never exceeded.
_DEFAULT_ORIGINAL: Final = {"phi3": 4096, "phi3_v": 4096, "phi4_multimodal": 4096}
_PADDING: Final = 1  # the id of their padding token if the configuration has none


def model_config(directory: Path, *, error: type[LoraDeployError] = BundleError) -> dict[str, Any]:
    """The contents of config.json in `directory`; empty if it does not exist.

    Raises:
        `error`: it cannot be read, or is not an object.
    """
    return optional_json(directory / CONFIG_NAME, error=error)


def context_length(config: Mapping[str, Any]) -> int | None:
    """The maximum number of tokens, prompt and generated, that a bundle of `config` is run with.

    The smaller one of `stated_length` and `rotary_limit`; None if there is neither.
    """
    lengths = [stated_length(config), rotary_limit(config)]
    return min((length for length in lengths if length is not None), default=None)


def rotary_limit(config: Mapping[str, Any]) -> int | None:
    """The number of tokens up to which rotary frequencies are constant; None if they always are.

    With rope scaling of type longrope (Phi-3), all positions use `long_factor` once the sequence
    exceeds the original length. Keys in the cache were computed with `short_factor`: transformers
    computes them again, but a graph cannot.
    """
    inner = config.get("text_config")
    texts = inner if isinstance(inner, Mapping) else config
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        given = texts.get(name)
        if not isinstance(given, Mapping):
            continue
        for each in (given, *given.values()):  # one for all layers, or one for each kind of layer
            if not isinstance(each, Mapping):
                continue
            kind = each.get("rope_type", each.get("type"))
            if kind not in _SWITCHING or each.get("short_factor") == each.get("long_factor"):
                continue
            default = _DEFAULT_ORIGINAL.get(str(texts.get("model_type")))
            # transformers takes the model's own value, versions before 5 that of the scaling.
            lengths: tuple[Any, ...] = (each.get(_ORIGINAL), texts.get(_ORIGINAL, default))
            for length in lengths:
                if type(length) in (int, float) and float(length).is_integer():
                    found.append(int(length))
    return min(found, default=None)


def stated_length(config: Mapping[str, Any]) -> int | None:
    """The maximum number of tokens, prompt and generated, of the model of `config`.

    `config`: the contents of config.json; its text_config has precedence. None if it does not
    specify a length. If it is below 1, the model has no position for a token. Rope scaling of type
    yarn extends the original length by its factor; users enable it without another change (Qwen).
    """
    text = config.get("text_config")
    found = _named(text) if isinstance(text, Mapping) else None
    settings: Mapping[str, Any] = config if found is None or text is None else text
    positions = _named(config) if found is None else found
    if positions is not None:
        positions = max(positions, _extended(settings, positions))
    if positions is None or settings.get("model_type") not in FROM_PADDING_ON:
        return positions
    padding = settings.get("pad_token_id")
    return positions - 1 - (padding if type(padding) is int else _PADDING)


def _named(config: Mapping[str, Any]) -> int | None:
    values = (config.get(name) for name in _NAMES)
    return next((value for value in values if type(value) is int), None)


def _extended(config: Mapping[str, Any], positions: int) -> int:
    """The length to which rope scaling of type yarn extends the original one; 0 without it."""
    for name in ("rope_parameters", "rope_scaling"):
        given = config.get(name)
        if not isinstance(given, Mapping) or given.get("rope_type", given.get("type")) != "yarn":
            continue
        original, factor = given.get(_ORIGINAL) or positions, given.get("factor")
        if isinstance(original, int | float) and isinstance(factor, int | float):
            try:
                extended = float(original) * factor
            except OverflowError:  # of an integer
                return 0
            return int(extended) if math.isfinite(extended) else 0
    return 0

"""Read the config of a graph from the files beside it.

The onnxruntime-genai builder writes no config.json; its genai_config.json has what is needed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import GENAI_CONFIG_NAME
from loradeploy.errors import ModelError
from loradeploy.files import read_json

_TIED: Final = "tie_word_embeddings"


def settings_beside(directory: Path, checkpoint: Path | None) -> dict[str, Any]:
    """The config of the graph, else of the checkpoint, else derived from onnxruntime-genai's."""
    config = model_config(directory, error=ModelError)
    if not config and checkpoint is not None:
        config = model_config(checkpoint, error=ModelError)
    return config or _from_genai(genai_settings(directory))


def ties_head(settings: Mapping[str, Any]) -> bool | None:
    """Whether a model with this config ties its output head to the embedding; None if unknown.

    transformers omits the field if it is true by default.
    """
    inner = settings.get("text_config")
    stated = (inner if isinstance(inner, Mapping) else settings).get(_TIED)
    if isinstance(stated := settings.get(_TIED, stated), bool):
        return stated
    return True if "architectures" in settings else None  # onnxruntime-genai's does not say


def assets_of(directory: Path, checkpoint: Path | None) -> Path:
    """The directory of the tokenizer: that of the graph, or the checkpoint."""
    if checkpoint is None or any(directory.glob("tokenizer*")):
        return directory
    return checkpoint


def genai_settings(directory: Path) -> dict[str, Any]:
    """The section `model` of genai_config.json; empty if it does not exist."""
    file = directory / GENAI_CONFIG_NAME
    if not file.is_file():
        return {}
    model = read_json(file, error=ModelError).get("model")
    return model if isinstance(model, dict) else {}


def _from_genai(model: Mapping[str, Any]) -> dict[str, Any]:
    decoder = model.get("decoder")
    if not isinstance(decoder, Mapping):
        return {}
    named = {
        "model_type": model.get("type"),
        "vocab_size": model.get("vocab_size"),
        "max_position_embeddings": model.get("context_length"),
        "hidden_size": decoder.get("hidden_size"),
        "head_dim": decoder.get("head_size"),
        "num_hidden_layers": decoder.get("num_hidden_layers"),
        "num_attention_heads": decoder.get("num_attention_heads"),
        "num_key_value_heads": decoder.get("num_key_value_heads"),
        **{f"{token}_token_id": model.get(f"{token}_token_id") for token in ("bos", "eos", "pad")},
    }
    return {name: value for name, value in named.items() if value is not None}

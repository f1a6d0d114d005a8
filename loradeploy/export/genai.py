"""genai_config.json: what onnxruntime-genai needs to open a decoder's bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.model_config import context_length
from loradeploy.bundle.names import ATTENTION_MASK, GRAPH_NAME, INPUT_IDS, LOGITS, POSITION_IDS
from loradeploy.bundle.outputs import main_output

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest, TensorSpec


# The decoders that onnxruntime-genai knows by name (src/models/model_type.h, 0.18); any other
# graph of the same shape opens as "decoder".
_KNOWN: Final = frozenset(
    (
        *("chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gemma4_text", "gptoss"),
        *("granite", "internlm2", "llama", "mistral", "nemotron", "olmo", "phi", "phimoe", "phi3"),
        *("phi3small", "qwen2", "qwen3", "smollm3"),
    )
)

_UNKNOWN_LENGTH: Final = 2048  # context length, if config.json has none
_SEARCH: Final[Mapping[str, Any]] = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


def genai_config(
    manifest: Manifest, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The config for the graph of `manifest`; None if onnxruntime-genai cannot run the graph.

    It cannot if the layers' caches differ in layout or have a fixed size. `config` and `generation`
    are the objects of config.json and generation_config.json. The cache's layout is that of the
    graph's inputs.
    """
    keys = [spec for spec in manifest.inputs if spec.name.endswith(".key")]
    if not keys or any(spec.shape != keys[0].shape for spec in keys):
        return None
    if isinstance(keys[0].shape[0], int) or isinstance(keys[0].shape[2], int):
        return None
    _, heads, _, head_size = keys[0].shape
    names = {spec.name for spec in manifest.inputs}
    plain = {name: name for name in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS) if name in names}
    merged = {**config, **{k: v for k, v in generation.items() if v is not None}}
    end = merged.get("eos_token_id")
    first_end = end[0] if isinstance(end, list) and end else end
    length = context_length(config) or _UNKNOWN_LENGTH
    search = {**_SEARCH, "past_present_share_buffer": manifest.cache_in_place}
    model_type = str(config.get("model_type", "decoder"))
    return {
        "model": {
            "bos_token_id": _first(merged.get("bos_token_id"), 1),
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GRAPH_NAME,
                "head_size": head_size,
                "hidden_size": _first(config.get("hidden_size"), config.get("n_embd")),
                "inputs": {
                    **plain,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    LOGITS: _scores(manifest.outputs),
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": _first(
                    config.get("num_attention_heads"), config.get("n_head"), heads
                ),
                "num_hidden_layers": len(keys),
                "num_key_value_heads": heads,
            },
            "eos_token_id": _first(end, 2),
            "pad_token_id": _first(merged.get("pad_token_id"), first_end, 0),
            "type": model_type if model_type in _KNOWN else "decoder",
            "vocab_size": _vocabulary(manifest.outputs, config),
        },
        "search": {
            **{name: _first(merged.get(name), value) for name, value in search.items()},
            "max_length": length,
        },
    }


def _vocabulary(outputs: Sequence[TensorSpec], config: Mapping[str, Any]) -> Any:
    last = next((spec.shape[-1] for spec in outputs if spec.name == _scores(outputs)), None)
    return last if isinstance(last, int) else config.get("vocab_size")


def _scores(outputs: Sequence[TensorSpec]) -> str:
    ranks = {spec.name: len(spec.shape) for spec in outputs}
    return main_output(CAUSAL_LM, ranks) or LOGITS


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)

"""genai_config.json: what onnxruntime-genai needs to open a bundle of a decoder, or of Whisper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.bundle.model_config import context_length
from loradeploy.bundle.names import (
    ATTENTION_MASK,
    CROSS,
    DECODER_INPUT_IDS,
    ENCODER_HIDDEN_STATES,
    ENCODER_NAME,
    GRAPH_NAME,
    INPUT_FEATURES,
    INPUT_IDS,
    LOGITS,
    PAST,
    POSITION_IDS,
    PRESENT,
    SELF,
)
from loradeploy.bundle.outputs import main_output

if TYPE_CHECKING:
    from loradeploy.bundle.audio.features import FeatureSettings
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
_SESSION: Final = {"log_id": "onnxruntime-genai", "provider_options": []}
# The number of audio frames that its Whisper takes (src/models/whisper.h), and how its features are
# computed: the window of 400 samples, every 160 samples, over 30 seconds.
_FRAMES: Final = 3000
_WINDOW, _HOP, _SECONDS = 400, 160, 30
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
    model_type = str(config.get("model_type", "decoder"))
    decoder: dict[str, Any] = {
        "session_options": _SESSION,
        "filename": GRAPH_NAME,
        "head_size": head_size,
        "hidden_size": _first(config.get("hidden_size"), config.get("n_embd")),
        "inputs": {**plain, **_parts("past_%s_names", f"{PAST}%d.")},
        "outputs": {
            LOGITS: _scores(manifest.outputs),
            **_parts("present_%s_names", f"{PRESENT}%d."),
        },
        "num_attention_heads": _first(
            config.get("num_attention_heads"), config.get("n_head"), heads
        ),
        "num_hidden_layers": len(keys),
        "num_key_value_heads": heads,
    }
    return _of_parts(
        {"decoder": decoder, "type": model_type if model_type in _KNOWN else "decoder"},
        manifest,
        {**config, **{k: v for k, v in generation.items() if v is not None}},
        context_length(config) or _UNKNOWN_LENGTH,
    )


def whisper_config(
    manifest: Manifest, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The config for the two graphs of a Whisper bundle; None if onnxruntime-genai cannot run it.

    It cannot if the model takes other windows than 30 s, or the graphs have side inputs: it passes
    an active adapter to neither graph (`WhisperState` in src/models/whisper.cpp, 0.18), and would
    generate as the base without a word.
    """
    encoder, shapes = manifest.encoder, {spec.name: spec.shape for spec in manifest.inputs}
    if encoder is None or ENCODER_HIDDEN_STATES not in encoder.outputs or manifest.side_inputs():
        return None
    if encoder.inputs != (INPUT_FEATURES,) or shapes[INPUT_FEATURES][-1] != _FRAMES:
        return None
    caches = [spec.shape for spec in manifest.inputs if spec.name.endswith(f".{SELF}key")]
    _, heads, _, head_size = caches[0]
    sizes = {
        "session_options": _SESSION,
        "head_size": head_size,
        "hidden_size": config["d_model"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    decoder: dict[str, Any] = {
        **sizes,
        "filename": GRAPH_NAME,
        "inputs": {
            INPUT_IDS: DECODER_INPUT_IDS,
            **_parts("past_%s_names", f"{PAST}%d.{SELF}"),
            **_parts("cross_past_%s_names", f"{PAST}%d.{CROSS}"),
        },
        "outputs": {LOGITS: LOGITS, **_parts("present_%s_names", f"{PRESENT}%d.{SELF}")},
        "num_hidden_layers": len(caches),
    }
    encoding = {
        **sizes,
        "filename": ENCODER_NAME,
        "inputs": {"audio_features": INPUT_FEATURES},
        "outputs": {
            ENCODER_HIDDEN_STATES: ENCODER_HIDDEN_STATES,
            **_parts("cross_present_%s_names", f"{PRESENT}%d.{CROSS}"),
        },
        "num_hidden_layers": config.get("encoder_layers", len(caches)),
    }
    return _of_parts(
        {"encoder": encoding, "decoder": decoder, "type": "whisper"},
        manifest,
        {**config, **{k: v for k, v in generation.items() if v is not None}},
        int(config["max_target_positions"]),
    )


def audio_processor(features: FeatureSettings) -> dict[str, Any] | None:
    """The contents of audio_processor_config.json, how onnxruntime-genai computes features.

    None if it cannot compute those of `features`.
    """
    if (features.window, features.hop, features.chunk) != (_WINDOW, _HOP, _SECONDS):
        return None
    sizes = {"n_fft": _WINDOW, "hop_length": _HOP}
    steps = [
        ("audio_decoder", "AudioDecoder", None),
        ("STFT", "STFTNorm", {**sizes, "frame_length": _WINDOW}),
        (
            "log_mel_spectrogram",
            "LogMelSpectrum",
            {**sizes, "chunk_size": _SECONDS, "n_mel": features.mels},
        ),
    ]
    sequence = [
        {"operation": {"name": name, "type": kind, **({} if attrs is None else {"attrs": attrs})}}
        for name, kind, attrs in steps
    ]
    return {"feature_extraction": {"sequence": sequence}}


def _of_parts(
    parts: Mapping[str, Any], manifest: Manifest, tokens: Mapping[str, Any], length: int
) -> dict[str, Any]:
    """The whole config. `tokens`: the settings of config.json and generation_config.json."""
    end = tokens.get("eos_token_id")
    first_end = end[0] if isinstance(end, list) and end else end
    search = {**_SEARCH, "past_present_share_buffer": manifest.cache_in_place}
    return {
        "model": {
            "bos_token_id": _first(tokens.get("bos_token_id"), 1),
            "context_length": length,
            **parts,
            "eos_token_id": _first(end, 2),
            "pad_token_id": _first(tokens.get("pad_token_id"), first_end, 0),
            "vocab_size": _vocabulary(manifest.outputs, tokens),
        },
        "search": {
            **{name: _first(tokens.get(name), value) for name, value in search.items()},
            "max_length": length,
        },
    }


def _parts(field: str, prefix: str) -> dict[str, str]:
    """The fields that name the keys and values of a cache; %s in `field` stands for the part."""
    return {field % part: f"{prefix}{part}" for part in ("key", "value")}


def _vocabulary(outputs: Sequence[TensorSpec], config: Mapping[str, Any]) -> Any:
    last = next((spec.shape[-1] for spec in outputs if spec.name == _scores(outputs)), None)
    return last if isinstance(last, int) else config.get("vocab_size")


def _scores(outputs: Sequence[TensorSpec]) -> str:
    ranks = {spec.name: len(spec.shape) for spec in outputs}
    return main_output(CAUSAL_LM, ranks) or LOGITS


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)

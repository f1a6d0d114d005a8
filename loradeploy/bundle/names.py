"""Names of graph inputs, graph outputs and files."""

from __future__ import annotations

from typing import Final

from loradeploy.names import MODEL_CONFIG_NAME

INPUT_IDS: Final = "input_ids"  # int64 [batch, sequence]
ATTENTION_MASK: Final = "attention_mask"  # int64 [batch, past + sequence]
POSITION_IDS: Final = "position_ids"  # int64 [batch, sequence]
# int64 [sequence], in graphs of other exporters; a bundle computes it
CACHE_POSITION: Final = "cache_position"
TOKEN_TYPE_IDS: Final = "token_type_ids"  # int64 [batch, sequence]
DECODER_INPUT_IDS: Final = "decoder_input_ids"  # int64 [batch, target]
# float [batch, channels, height, width], or in patches [batch, rows, columns, merged, values]
PIXEL_VALUES: Final = "pixel_values"
ENCODER_ATTENTION_MASK: Final = "encoder_attention_mask"  # int64 [batch, source]
INPUTS_EMBEDS: Final = "inputs_embeds"  # float [batch, sequence, hidden], in place of tokens
INPUTS_EMBEDS_MASK: Final = "inputs_embeds_mask"  # bool [batch, sequence]: where they are used
# int64 [3, batch, sequence]: time, row and column, in place of position_ids
MROPE_POSITION_IDS: Final = "mrope_position_ids"
IMAGE_FEATURES: Final = "image_features"  # float [images, tokens, hidden]
INPUT_FEATURES: Final = "input_features"  # float [batch, mel bins, frames]
ENCODER_HIDDEN_STATES: Final = "encoder_hidden_states"  # float [batch, source, hidden]
ADAPTER_IDS: Final = "adapter_ids"  # int64 [batch] or [1]: each row's slot in the side inputs
# int64 [slots, targets], or [0, targets]: the ranks of the adapters in the slots of the side inputs
ADAPTER_RANKS: Final = "adapter_ranks"
# int64 [1]: 0 for the branch of the base, 1 for the one with adapters
ADAPTER_MODE: Final = "adapter_mode"
# int64 [batch, kept] or [1, kept]: the positions that get logits; [1, 0] is all
LOGITS_TO_KEEP: Final = "logits_to_keep"
KEPT: Final = "kept"  # the dimension of the positions that logits_to_keep selects
BASE, ROWS, SLOTS = "base", "rows", "slots"
LEFT, RIGHT, NO_PADDING = "left", "right", "none"
LAYOUTS: Final = (SLOTS, ROWS)  # of the first dimension of side inputs
# The functions that a graph may call, and the operators of the library that replace them: low-rank
# updates (of one layer, of two or three whose product is fused, of one with a residual, of gate and
# up), the standard nodes of the same names, and silu(gate) · up.
OPERATOR_DOMAIN: Final = "loradeploy"
LORA_ADD_OPERATOR: Final = "LoraAdd"
LORA_ADD_2_OPERATOR: Final = "LoraAdd2"
LORA_ADD_3_OPERATOR: Final = "LoraAdd3"
LORA_ADD_RESIDUAL_OPERATOR: Final = "LoraAddResidual"
LORA_SWIGLU_OPERATOR: Final = "LoraSwiGLU"
LORA_OPERATORS: Final = (
    *(LORA_ADD_OPERATOR, LORA_ADD_2_OPERATOR),
    *(LORA_ADD_3_OPERATOR, LORA_ADD_RESIDUAL_OPERATOR, LORA_SWIGLU_OPERATOR),
)
MAT_MUL_N_BITS_OPERATOR: Final = "MatMulNBits"
ATTENTION_OPERATOR: Final = "Attention"
GROUP_QUERY_ATTENTION_OPERATOR: Final = "GroupQueryAttention"
SILU_MUL_OPERATOR: Final = "SiluMul"
SWIGLU_OPERATOR: Final = "SwiGLU"
OPERATORS: Final = (
    *(*LORA_OPERATORS, MAT_MUL_N_BITS_OPERATOR),
    *(ATTENTION_OPERATOR, GROUP_QUERY_ATTENTION_OPERATOR),
    *(SILU_MUL_OPERATOR, SWIGLU_OPERATOR),
)
LOGITS: Final = "logits"
START_LOGITS: Final = "start_logits"  # float [batch, sequence]: of the first token of an answer
END_LOGITS: Final = "end_logits"  # float [batch, sequence]: of its last token
LAST_HIDDEN_STATE: Final = "last_hidden_state"
POOLER_OUTPUT: Final = "pooler_output"  # float [batch, size]
TEXT_EMBEDS: Final = "text_embeds"  # float [batch, size]
IMAGE_EMBEDS: Final = "image_embeds"  # float [batch, size]
PAST: Final = "past_key_values."  # {i}.key and {i}.value: float [batch, heads, past, size]
PRESENT: Final = "present."
# The two caches of each layer of an encoder-decoder: {i}.decoder.key, {i}.encoder.key, …
SELF: Final = "decoder."
CROSS: Final = "encoder."

MANIFEST_NAME: Final = "loradeploy.json"
GRAPH_NAME: Final = "model.onnx"
ENCODER_NAME: Final = "encoder.onnx"  # of an encoder-decoder; model.onnx is the decoder
GRAPH_DATA_NAME: Final = "model.onnx.data"
DEFAULTS_NAME: Final = "defaults.safetensors"
BASE_NAME: Final = "base.safetensors"
CERTIFICATE_NAME: Final = "parity.json"
REQUIRED_NAME: Final = "required.onnx"
REQUIRED_VALUES_NAME: Final = "required.safetensors"  # the base's values of its side inputs
SIGNATURE_NAME: Final = "parity.json.sig"
CONFIG_NAME: Final = MODEL_CONFIG_NAME
# The preprocessing of audio and images. Newer releases of transformers write it into the second
# file, with the other settings of a processor.
PREPROCESSOR_NAME: Final = "preprocessor_config.json"
PROCESSOR_NAME: Final = "processor_config.json"
GENAI_CONFIG_NAME: Final = "genai_config.json"
GENAI_AUDIO_NAME: Final = "audio_processor_config.json"
ADAPTERS_DIRECTORY: Final = "adapters"
NATIVE_SUFFIX: Final = ".onnx_adapter"


def past_name(layer: int, part: str) -> str:
    """Graph input of a layer's cached `part`, key or value: [batch, kv_heads, past, head_dim]."""
    return f"{PAST}{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    """Graph output of a layer's `part`, key or value, past and new positions together."""
    return f"{PRESENT}{layer}.{part}"


def present_of(past: str) -> str:
    """The graph output that continues the graph input `past`."""
    return past.replace(PAST, PRESENT, 1)


def past_of(present: str) -> str:
    """The graph input that the graph output `present` is fed to."""
    return present.replace(PRESENT, PAST, 1)


def is_cross(name: str) -> bool:
    """Whether an input or output is a key or value of cross-attention in an encoder-decoder."""
    return name.startswith((PAST, PRESENT)) and f".{CROSS}" in name


def lora_a_name(module: str) -> str:
    """Side input of a target module's first factor: [adapters, in, rank]."""
    return f"{module}.lora_A"


def lora_b_name(module: str) -> str:
    """Side input of a target module's second factor: [adapters, rank, out], scaling folded in."""
    return f"{module}.lora_B"


def scale_name(module: str) -> str:
    """Side input that a module's output is multiplied by: [adapters, out]."""
    return f"{module}.scale"


def offset_name(module: str) -> str:
    """Side input that is added to a module's output: [adapters, out]."""
    return f"{module}.offset"

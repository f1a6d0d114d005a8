"""Names of backends, phases and optimization levels, as options and reports use them.

This module imports nothing that runs them, so that the command line can list them quickly.
"""

from __future__ import annotations

from typing import Final

from loradeploy.bundle.proof.record import ONNX_MERGED as ONNX_MERGED
from loradeploy.bundle.proof.record import ONNX_MIXED as ONNX_MIXED
from loradeploy.bundle.proof.record import ONNX_NATIVE as ONNX_NATIVE
from loradeploy.bundle.proof.record import ONNX_SIDE_INPUTS as ONNX_SIDE_INPUTS

TORCH_MERGED: Final = "torch-merged"
PEFT: Final = "peft"
ONNX_GENAI: Final = "onnx-genai"
ONNX_REFERENCE: Final = "onnx-reference"

# In the order in which they are run: `loradeploy.parity.backends.table` has a row for each.
BACKEND_NAMES: Final = (
    TORCH_MERGED,
    PEFT,
    ONNX_MERGED,
    ONNX_SIDE_INPUTS,
    ONNX_NATIVE,
    ONNX_MIXED,
    ONNX_GENAI,
    ONNX_REFERENCE,
)

PREFILL: Final = "prefill"
ONE_ROW: Final = "one row"
CHUNKED: Final = "chunked prefill"
PADDED_BATCH: Final = "padded batch"
PERMUTED: Final = "permuted batch"
DECODE: Final = "decode"
REPEAT: Final = "repeat"
EMBEDDED: Final = "embeddings"  # of decoders of images and text
ENCODER: Final = "encoder"  # of encoder-decoders

DECODER_PHASES: Final = (PREFILL, CHUNKED, PADDED_BATCH, PERMUTED, DECODE, REPEAT)
ENCODER_PHASES: Final = (ONE_ROW, PADDED_BATCH, PERMUTED, REPEAT)
# For encoder-decoders, whose rows are targets.
SEQ2SEQ_PHASES: Final = (ENCODER, PREFILL, PADDED_BATCH, PERMUTED, DECODE, REPEAT)
ALL_PHASES: Final = tuple(dict.fromkeys((*DECODER_PHASES, EMBEDDED, *ENCODER_PHASES, ENCODER)))

# Levels of graph optimization, and their members in onnxruntime's GraphOptimizationLevel.
LEVELS: Final = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}

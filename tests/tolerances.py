"""Every tolerance of the tests, with its reason. A test that needs another adds a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Tolerance:
    """The largest absolute difference that counts as equal, and why."""

    absolute: float
    reason: str


TOLERANCES: Final = {
    "same-torch": Tolerance(
        1e-5, "the same float32 products in the same library, summed in another order"
    ),
    "torch-onnx-tiny": Tolerance(
        1e-4, "float32 in two libraries over two layers; logits of these models reach 10"
    ),
    "torch-onnx-smollm2": Tolerance(
        5e-4,
        "float32 in two libraries over thirty layers; logits reach 30. The sums' order is the"
        " processor's: 1.1e-4 to 2.2e-4 are seen",
    ),
    "merged-torch": Tolerance(
        3e-5, "as same-torch, and each merged weight is rounded to float32 once more"
    ),
    "bf16-rounding": Tolerance(
        1e-2, "of the largest value: bfloat16 keeps 8 bits, and sums are rounded at other places"
    ),
    "fp16-rounding": Tolerance(
        2e-3, "of the largest value: float16 keeps 11 bits, and two builds sum in other orders"
    ),
    "log-mel": Tolerance(1e-5, "float64 on both sides, stored as float32; 1.2e-7 is seen"),
    "log-mel-torch": Tolerance(
        1e-4,
        "torch's float32 transforms: of a tone, bands of 8 decades less power carry its rounding;"
        " 5.8e-5 is seen, and 1e-5 of noise",
    ),
    "rows": Tolerance(
        2e-5, "one graph, but a batch and a single row take different matrix kernels"
    ),
    "webgpu-cpu": Tolerance(
        1e-4, "float32 in two providers over two layers; 1.3e-5 is seen, logits reach 10"
    ),
    "export-fp16": Tolerance(1e-4, "1 − cosine of the logits: 11 bits of every number are kept"),
    "export-bf16": Tolerance(1e-3, "1 − cosine of the logits: 8 bits of every weight are kept"),
    "export-int8": Tolerance(2e-3, "1 − cosine: weights and activations in 8 bits, blocks of 32"),
    "export-int4": Tolerance(0.15, "1 − cosine: 16 levels hold random weights badly; 0.06 is seen"),
}


def tolerance(name: str) -> float:
    """The largest absolute difference of the row `name`."""
    return TOLERANCES[name].absolute

"""All numeric tolerances of the tests, each with its reason. New tolerances are added here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Tolerance:
    """The largest difference that counts as equal, and the reason for its size.

    The difference is absolute unless the reason says "relative to the largest value" or
    "1 − cosine".
    """

    absolute: float
    reason: str


TOLERANCES: Final = {
    "same-torch": Tolerance(
        1e-5, "float32 in one library on both sides; only the order of the sums differs"
    ),
    "torch-onnx-tiny": Tolerance(
        1e-4, "float32 in two libraries, two layers; the logits of these models reach 10"
    ),
    "random-models": Tolerance(
        1e-4,
        "relative to the largest value: float32 in two libraries, random models and adapters whose"
        " values grow from layer to layer; a wrong adapter differs by 0.1",
    ),
    "torch-onnx-smollm2": Tolerance(
        5e-4,
        "float32 in two libraries, thirty layers; the logits reach 30. The order of the sums"
        " depends on the processor: differences of 1.1e-4 to 2.2e-4 were measured",
    ),
    "merged-torch": Tolerance(
        3e-5, "like same-torch, plus one more rounding of each merged weight to float32"
    ),
    "bf16-rounding": Tolerance(
        1e-2,
        "relative to the largest value: bfloat16 has 8 bits of precision, and the two sides round"
        " their sums at different places",
    ),
    "fp16-rounding": Tolerance(
        2e-3,
        "relative to the largest value: float16 has 11 bits of precision, and two builds of"
        " onnxruntime sum in different orders",
    ),
    "log-mel": Tolerance(1e-5, "float64 on both sides, rounded to float32; 1.2e-7 was measured"),
    "log-mel-torch": Tolerance(
        1e-4,
        "torch computes the transform in float32. For a pure tone, the rounding error shows in the"
        " bands whose power is 8 decades lower: 5.8e-5 was measured, and 1e-5 for noise",
    ),
    "rows": Tolerance(
        2e-5, "float32 in one graph, but a batch and a single row use different matrix kernels"
    ),
    "operator": Tolerance(
        3e-6, "relative to the largest value: float32 sums of at most 576 and 64 numbers"
    ),
    "blocks": Tolerance(
        2e-6,
        "relative to the largest value: the same integers, their float32 sums in another order;"
        " 4e-7 was measured",
    ),
    "attention": Tolerance(
        5e-6,
        "float32 on both sides; rounding of scores of 10 changes their exponentials by 1e-6, and"
        " the values reach 4. Both differ from float64 by as much",
    ),
    "webgpu-cpu": Tolerance(
        1e-4, "float32 in two providers, two layers; the logits reach 10, 1.3e-5 was measured"
    ),
    "export-fp16": Tolerance(
        1e-4, "1 − cosine of the logits: all numbers have 11 bits of precision"
    ),
    "export-bf16": Tolerance(
        1e-3, "1 − cosine of the logits: all weights have 8 bits of precision"
    ),
    "export-int8": Tolerance(
        2e-3, "1 − cosine of the logits: weights and activations in 8 bits, blocks of 32"
    ),
    "export-int4": Tolerance(
        0.15,
        "1 − cosine of the logits: 16 levels represent random weights poorly; 0.06 was measured",
    ),
}


def tolerance(name: str) -> float:
    """Return the largest allowed difference of the entry `name` of TOLERANCES."""
    return TOLERANCES[name].absolute

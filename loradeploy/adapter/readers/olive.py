"""Adapters that Olive converted for its ONNX models: y = W x + (x a) b, s included in b.

<module>.lora_A.weight [in, rank]     <module>.lora_B.weight [rank, out]

The names are PEFT's, the factors are transposed. Olive writes them as .onnx_adapter or
.safetensors, without PEFT's config.
"""

from __future__ import annotations

from typing import Final

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.readers.source import Source, adapter_of, check_complete, halves

_ENDINGS: Final = {".lora_A.weight": "A", ".lora_B.weight": "B"}
# Olive leaves it out where the base's modules begin with `model`.
_PREFIX: Final = "base_model.model."


def read(source: Source) -> Adapter:
    """The adapter in PEFT's convention: A = aᵀ, B = bᵀ, alpha = rank."""
    modules, others = halves(source.shapes, _ENDINGS)
    check_complete(modules, others)
    factors = {
        module.removeprefix(_PREFIX): Factors(source.array(keys["A"]).T, source.array(keys["B"]).T)
        for module, keys in modules.items()
    }
    return adapter_of(factors, dict.fromkeys(factors, 1.0))

"""The names of dtypes in numpy, in ONNX Runtime and in server protocols."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

NUMPY_NAMES: Final[Mapping[str, str]] = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(string)": "str",
    **{f"tensor({name})": name for name in ("float16", "bfloat16", "bool")},
    **{f"tensor({name})": name for name in ("int64", "int32", "int16", "int8")},
    **{f"tensor({name})": name for name in ("uint64", "uint32", "uint16", "uint8")},
}
# The Open Inference Protocol's names by numpy's. Triton puts TYPE_ before them.
PROTOCOL_NAMES: Final[Mapping[str, str]] = {
    "bool": "BOOL",
    **{
        f"{kind}{bits}": f"{kind}{bits}".upper()
        for kind in ("uint", "int")
        for bits in (8, 16, 32, 64)
    },
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
    "bfloat16": "BF16",
}

"""ONNX Runtime's names of the dtypes of tensors, as numpy calls them."""

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

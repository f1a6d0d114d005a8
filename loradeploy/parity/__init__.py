"""Compares the outputs of backends (PyTorch, PEFT, ONNX Runtime) and reports a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loradeploy.parity.assertion import assert_parity

__all__ = ["assert_parity"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loradeploy.parity.assertion import assert_parity

    return assert_parity

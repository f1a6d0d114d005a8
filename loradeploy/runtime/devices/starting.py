"""Try whether an execution provider starts, on a graph of one node.

An installed provider may lack a library, a driver or a device. ONNX Runtime reports this in
different ways: an exception when the session is opened (TensorRT), or a session on the CPU (CUDA).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.errors import UsageError, first_line
from loradeploy.runtime.devices.quiet import FATAL, unlogged
from loradeploy.runtime.devices.table import known

# y = −x in ONNX, opset 13: a graph that any provider can run.
TINY_GRAPH: Final = (
    b'\x08\x08\x12\x00:2\n\x0b\n\x01x\x12\x01y"\x03Neg\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04'
    b"\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


def check_starts(name: str, options: Mapping[str, Any], device: Any) -> None:
    """Raise UsageError unless the provider `name` starts with `options`.

    `device`: for a plugin, the device to start on.
    """
    why = why_not(name, options, device)
    if why is None:
        return
    state = (
        "but does not start here" if device is None else "and finds a device, which does not start"
    )
    raise UsageError(f"{name} is installed {state}: {why}. It needs {known(name).needs}")


def why_not(name: str, options: Mapping[str, Any], device: Any = None) -> str | None:
    """The reason why the provider `name` does not start with `options`; None if it starts."""
    import onnxruntime

    tiny = onnxruntime.SessionOptions()
    tiny.log_severity_level = FATAL
    by_name = [(name, dict(options))] if device is None else None
    try:
        with unlogged():
            if device is not None:
                tiny.add_provider_for_devices([device], options)
            session = onnxruntime.InferenceSession(
                TINY_GRAPH, tiny, providers=by_name, enable_fallback=0
            )
    except Exception as problem:  # onnxruntime's exceptions share no base but this
        return missing_library(name) or first_line(problem)
    if name in session.get_providers():
        return None
    return missing_library(name) or "no device or driver answers"


def missing_library(name: str) -> str | None:
    """The library that the provider's own library lacks, in a message of the system's loader.

    None if none is missing, or if the provider has no separate library.
    """
    import onnxruntime

    kind = name.removesuffix("ExecutionProvider").lower()
    windows = sys.platform == "win32"
    file = f"onnxruntime_providers_{kind}.dll" if windows else f"libonnxruntime_providers_{kind}.so"
    place = Path(onnxruntime.__file__).parent / "capi" / file
    if not place.is_file():
        return None
    try:
        ctypes.CDLL(str(place))
    except OSError as problem:
        return " ".join(str(problem).split())
    return None

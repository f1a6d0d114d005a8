"""Print the providers of each graph's nodes, in a process that loads the stub libraries.

    python -m tools.cuda_placement.placing [--device] GRAPH…    # prints JSON

This is a separate process because LD_LIBRARY_PATH only applies at the start of a process, and a
crash in native code must not end the caller.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Final

DEVICE: Final = "--device"  # use the machine's CUDA libraries, not the stubs
_CUDA: Final = "CUDAExecutionProvider"
_CPU: Final = "CPUExecutionProvider"
_RECORD: Final = "session.record_ep_graph_assignment_info"
_WARNING, _ERROR = 2, 3
_COPIES: Final = re.compile(r"(\d+) Memcpy nodes are added to the graph")
# The prefix of ONNX Runtime's error when a session cannot be captured.
_STATUS: Final = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")


def place(graph: str) -> dict[str, Any]:
    """Return the nodes by provider, the number of copies, and whether a CUDA graph can be captured.

    `nodes`: [operator, name] by provider. `refusal`: ONNX Runtime's reason; None if it accepts.
    """
    with _standard_error() as said:
        session = _open(graph, _WARNING, {}, record=True)
    copies = sum(int(number) for number in _COPIES.findall(said[0]))
    nodes: dict[str, list[list[str]]] = {}
    for subgraph in session.get_provider_graph_assignment_info():
        nodes.setdefault(subgraph.ep_name, []).extend(
            [f"{n.domain}:{n.op_type}" if n.domain else n.op_type, n.name]
            for n in subgraph.get_nodes()
        )
    refusal = None
    try:
        with _standard_error():
            _open(graph, _ERROR, {"enable_cuda_graph": "1"})
    except Exception as problem:  # onnxruntime's error classes have no common base
        refusal = _STATUS.sub("", str(problem)).strip()
    return {
        "running": session.get_providers(),
        "nodes": nodes,
        "copies": copies,
        "refusal": refusal,
    }


def _open(graph: str, severity: int, cuda: dict[str, str], *, record: bool = False) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = severity
    if record:
        options.add_session_config_entry(_RECORD, "1")
    return onnxruntime.InferenceSession(
        graph, options, providers=[(_CUDA, cuda), _CPU], enable_fallback=0
    )


@contextmanager
def _standard_error() -> Iterator[list[str]]:
    """Capture what native code writes to stderr; the yielded list has it after the block."""
    said: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    file: IO[bytes]
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def _main(arguments: list[str]) -> None:
    if arguments[:1] == [DEVICE]:
        from loradeploy.runtime.devices.providers import preload_cuda

        preload_cuda()
    print(json.dumps([place(graph) for graph in arguments if graph != DEVICE]))


if __name__ == "__main__":
    _main(sys.argv[1:])

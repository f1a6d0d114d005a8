"""The placement of a graph's nodes on CUDA and the CPU, with explanations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loradeploy.bundle.names import GRAPH_NAME, REQUIRED_NAME
from loradeploy.errors import LoraDeployError, UsageError
from tools.cuda_placement.placing import DEVICE
from tools.cuda_placement.stubs import stubs

CUDA: Final = "CUDAExecutionProvider"
CPU: Final = "CPUExecutionProvider"
_MICROSOFT: Final = "com.microsoft:"
_ROOT: Final = Path(__file__).parent.parent.parent

# Operators that onnxruntime keeps on the CPU because they compute on shapes, which are in host
# memory: a few numbers, which cost no time. The same operators on data are not distinguished here;
# they would show as copies.
SHAPES: Final = (
    *("Add", "Cast", "Concat", "Div", "Equal", "Gather", "Mul", "Reshape", "Shape", "Size"),
    *("Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
)
_SHAPES_WHY: Final = "shapes, a few numbers in the host's memory"
# Operators on data, and why CUDA has no kernel for them.
WHY: Final[Mapping[str, str]] = {
    f"{_MICROSOFT}GroupQueryAttention": "CUDA computes it in fp16 and bf16 only: every step copies"
    " queries, keys and values to the CPU and back",
    "Attention": "this onnxruntime has no CUDA kernel for it: every step copies the cache",
    "MatMul": "a product on the CPU: its inputs are there, and are not copied to the device",
    f"{_MICROSOFT}MatMulNBits": "quantized products on the CPU",
}
_OTHERWISE: Final = "onnxruntime has no CUDA kernel for it: its inputs and outputs are copied"


@dataclass(frozen=True)
class CpuNode:
    """The number of nodes of one operator on the CPU, and the explanation."""

    op: str
    count: int
    why: str


@dataclass(frozen=True)
class Placement:
    """The execution providers of a graph's nodes.

    `graph`: the file's name. `nodes`: [operator, name] by provider. `copies`: number of nodes that
    copy between host and device. `refusal`: ONNX Runtime's reason not to capture the session as a
    CUDA graph; None if it would.
    """

    graph: str
    nodes: Mapping[str, Sequence[tuple[str, str]]]
    copies: int
    refusal: str | None

    @property
    def counts(self) -> dict[str, int]:
        """The number of nodes by provider."""
        return {provider: len(nodes) for provider, nodes in self.nodes.items()}

    @property
    def on_cpu(self) -> Counter[str]:
        """The number of nodes on the CPU, by operator."""
        return Counter(op for op, _ in self.nodes.get(CPU, ()))

    @property
    def cpu_nodes(self) -> list[CpuNode]:
        """The operators on the CPU with explanations; those on data come first."""
        rows = [CpuNode(op, count, why(op)) for op, count in self.on_cpu.most_common()]
        return sorted(rows, key=lambda row: row.op in SHAPES)

    def to_json(self) -> dict[str, Any]:
        """Return the placement as a JSON object, without the names of nodes."""
        return {
            "graph": self.graph,
            "nodes": self.counts,
            "operators": {name: dict(Counter(op for op, _ in n)) for name, n in self.nodes.items()},
            "cpu": [{"op": row.op, "nodes": row.count, "why": row.why} for row in self.cpu_nodes],
            "copies": self.copies,
            "cuda_graph": {"accepted": self.refusal is None, "reason": self.refusal},
        }


def why(op: str) -> str:
    """Return the explanation of an operator on the CPU."""
    return _SHAPES_WHY if op in SHAPES else WHY.get(op, _OTHERWISE)


def graphs(bundle: Path) -> Iterator[Path]:
    """Yield the graph files of a bundle; an ONNX file is itself one.

    Raises:
        UsageError: there is no graph at `bundle`.
    """
    files = [bundle] if bundle.is_file() else [bundle / GRAPH_NAME, bundle / REQUIRED_NAME]
    found = [file for file in files if file.is_file()]
    if not found:
        raise UsageError(f"{bundle} is not a bundle or an ONNX file: give one that exists")
    yield from found


def placements(bundle: Path) -> list[Placement]:
    """Return the placement of every graph file of the bundle.

    Raises:
        UsageError: there is no graph at `bundle`.
        LoraDeployError: onnxruntime cannot open a graph.
        StubsUnavailableError: no compiler, or no onnxruntime with the CUDA provider.
    """
    return place(list(graphs(bundle)))


def place(files: Sequence[Path], *, device: bool = False) -> list[Placement]:
    """Return the placement of each graph, with stub libraries or, if `device`, on the real device.

    Raises: as `placements`.
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(_ROOT), *_paths()]))
    if not device:
        environment["LD_LIBRARY_PATH"] = str(stubs())
    options = [DEVICE] if device else []
    command = [sys.executable, "-m", "tools.cuda_placement.placing", *options, *map(str, files)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"the process ended with {child.returncode}"]
        named = " or ".join(map(str, files))
        raise LoraDeployError(f"onnxruntime does not open {named} on CUDA: {lines[-1]}")
    return [
        _placement(file, found) for file, found in zip(files, json.loads(child.stdout), strict=True)
    ]


def _placement(file: Path, found: Mapping[str, Any]) -> Placement:
    if CUDA not in found["running"]:
        raise LoraDeployError(f"onnxruntime opened {file} without CUDA: {found['running']}")
    nodes = {name: [(op, node) for op, node in each] for name, each in found["nodes"].items()}
    return Placement(file.name, nodes, found["copies"], found["refusal"])


def _paths() -> list[str]:
    return [path for path in (os.environ.get("PYTHONPATH"),) if path]

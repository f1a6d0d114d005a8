"""Where CUDA would run a bundle's nodes, known on a machine without a GPU.

    python -m tools.cuda_placement BUNDLE [--json]

onnxruntime's CUDA provider is opened on stub libraries (stubs.py) that do nothing and report
success. It partitions the graph as it does on a device: which nodes it has kernels for, which it
leaves to the CPU, where copies are needed, and whether the session could be captured as a CUDA
graph. It computes nothing: placement is known, numbers and times are not.
"""

from __future__ import annotations

from tools.cuda_placement.placement import Placement, place, placements
from tools.cuda_placement.stubs import StubsUnavailableError, stubs

__all__ = ["Placement", "StubsUnavailableError", "place", "placements", "stubs"]

"""Determine which of a bundle's nodes would run on CUDA, on a machine without a GPU.

    python -m tools.cuda_placement BUNDLE [--json]

onnxruntime's CUDA provider is loaded with stub libraries (stubs.py) that do nothing and report
success. It partitions the graph as on a device: this shows the nodes that have CUDA kernels, those
that fall back to the CPU, the copies, and whether the session could be captured as a CUDA graph.
Nothing is computed: numbers and times are not available.
"""

from __future__ import annotations

from tools.cuda_placement.placement import Placement, place, placements
from tools.cuda_placement.stubs import StubsUnavailableError, stubs

__all__ = ["Placement", "StubsUnavailableError", "place", "placements", "stubs"]

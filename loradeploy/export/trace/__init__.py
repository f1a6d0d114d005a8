"""Trace a checkpoint into an ONNX graph, with torch.export and torch.onnx."""

from loradeploy.export.trace.checkpoint import load_model
from loradeploy.export.trace.module import answers, trace

__all__ = ["answers", "load_model", "trace"]

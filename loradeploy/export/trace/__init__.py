"""Trace a checkpoint into an ONNX graph, with torch.export and torch.onnx."""

from loradeploy.export.trace.loading.checkpoint import load_model
from loradeploy.export.trace.module import pytorch_outputs, trace

__all__ = ["load_model", "pytorch_outputs", "trace"]

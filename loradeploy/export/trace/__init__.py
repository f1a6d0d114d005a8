"""From a checkpoint to a graph: torch.export and torch.onnx, for each kind of task."""

from loradeploy.export.trace.checkpoint import load_model
from loradeploy.export.trace.module import answers, trace

__all__ = ["answers", "load_model", "trace"]

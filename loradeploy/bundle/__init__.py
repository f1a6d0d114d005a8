"""The bundle format, which exports write and the runtime reads. Without torch and onnx."""

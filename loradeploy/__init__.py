"""loradeploy: train LoRA adapters, deploy them on ONNX Runtime, prove that nothing changed."""

__version__ = "0.1.0"

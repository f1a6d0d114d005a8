"""loradeploy: train LoRA adapters, deploy them on ONNX Runtime, prove that nothing changed."""

"""Run bundles with adapters: numbers and text from ONNX Runtime, without PyTorch."""

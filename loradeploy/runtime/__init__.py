"""Bundle and adapters to numbers and text, on ONNX Runtime alone."""

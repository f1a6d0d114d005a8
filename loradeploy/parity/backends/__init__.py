"""The backends that are compared with the reference: ONNX Runtime, PEFT, and other engines."""

"""What is compared with the reference: ONNX Runtime's ways to run a bundle, and other engines."""

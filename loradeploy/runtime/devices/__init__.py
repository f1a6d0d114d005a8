"""Devices: ONNX Runtime's execution providers, what is known of each, and how they are started."""

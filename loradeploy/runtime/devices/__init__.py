"""Devices: ONNX Runtime's execution providers, their known properties, and how to start them."""

"""Describe an adapter, a bundle, an ONNX file or a safetensors file as data."""

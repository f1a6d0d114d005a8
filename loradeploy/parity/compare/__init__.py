"""Compares any two models: ONNX files, bundles, PyTorch modules, Python functions."""

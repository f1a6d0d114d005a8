"""What a path is: an adapter, a bundle, an ONNX file or tensors, described as data."""

"""Export a model or an ONNX file to a bundle: tracing, graph surgery, graph merge."""

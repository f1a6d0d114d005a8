"""Model or ONNX file to bundle: tracing, graph surgery, graph merge."""

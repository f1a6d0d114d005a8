"""Read, check, run, edit and write ONNX graphs."""

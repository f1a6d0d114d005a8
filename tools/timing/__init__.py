"""What the benchmarks share: sides that take turns, charts, and the sides of onnxruntime-genai."""

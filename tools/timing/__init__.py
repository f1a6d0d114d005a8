"""Code shared by the benchmarks: timing of alternating sides, charts, onnxruntime-genai's sides."""

"""What development needs beside the package: real models, the demo, the benchmarks."""

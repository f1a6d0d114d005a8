"""Development tools outside of the package: test inputs, the demo, benchmarks, fuzzers."""

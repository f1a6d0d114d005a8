"""The benchmarks: what each thing takes in time and memory, beside what others take for it."""

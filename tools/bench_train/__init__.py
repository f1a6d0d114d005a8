"""Training benchmarks: loradeploy and other trainers, in turns."""

"""Benchmark of loradeploy against other engines for CPUs."""

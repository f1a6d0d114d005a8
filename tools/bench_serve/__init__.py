"""Benchmark of serving many clients and adapters, with loradeploy and other engines."""

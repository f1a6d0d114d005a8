"""Capacity planning for serving adapters: a simulation based on measurements (docs/scaling.md)."""

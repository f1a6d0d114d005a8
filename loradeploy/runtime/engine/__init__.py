"""Continuous batching: requests that arrive at any time share a batch, each with its adapter."""

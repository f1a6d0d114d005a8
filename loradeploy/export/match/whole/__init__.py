"""Biases, norms, embeddings and convolutions of a checkpoint, and where they are in a graph."""

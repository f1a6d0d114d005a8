"""Passes that change a graph's vocabulary, embeddings, positions and logits."""

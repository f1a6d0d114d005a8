"""Find biases, norms, embeddings and convolutions in a graph, and replace whole parameters."""

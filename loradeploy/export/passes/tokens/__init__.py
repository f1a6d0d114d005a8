"""What a graph has a row of per token: its vocabulary, its embeddings, its logits."""

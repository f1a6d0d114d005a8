"""Convert an encoder's states to the vector of a text, as in sentence-transformers."""

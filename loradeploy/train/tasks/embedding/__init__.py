"""Training of embedders: data, the vectors of texts, and the losses of vectors."""

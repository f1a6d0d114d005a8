"""Training of embedders: their data, what a text's vector is, and the losses of vectors."""

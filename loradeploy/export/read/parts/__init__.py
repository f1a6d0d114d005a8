"""Join the parts of an encoder-decoder that optimum exports: load, compare, join."""

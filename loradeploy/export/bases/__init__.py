"""The base graph that a bundle is made from: traced from a checkpoint, or read from a file."""

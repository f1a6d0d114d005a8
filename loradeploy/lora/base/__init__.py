"""The base model in PyTorch: where its files are, in which format, and how it is loaded."""

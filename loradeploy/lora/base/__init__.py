"""Find the files of base models, check their format, and load them in PyTorch."""

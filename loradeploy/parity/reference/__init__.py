"""The PyTorch side: the reference, and what is compared with it in PyTorch."""

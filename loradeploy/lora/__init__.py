"""LoRA in PyTorch: layers, injection, initialisation, merge."""

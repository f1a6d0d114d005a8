"""LoRA in PyTorch: layers, injection, initialization, merge."""

"""The reference in PyTorch, its rounding errors, and PEFT in the same model."""

"""Load the PyTorch model to trace: a checkpoint, or one part of it, in its dtype and memory."""

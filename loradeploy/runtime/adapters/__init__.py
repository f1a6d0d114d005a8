"""Adapters in memory: the bank, what is resident in it, and the tensors of mixed rows."""

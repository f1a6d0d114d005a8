"""Adapters in memory: the bank, its entries, and the stacked tensors of mixed batches."""

"""Decoding: how the rows of a batch go on from logits, token by token."""

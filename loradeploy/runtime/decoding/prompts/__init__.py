"""Prompts of a call: their arguments, tokens, adapters and batches."""

"""Responses: generated texts, streams of them, and tensors."""

"""Choosing the next token: sampling and beam search, their settings, and stopping."""

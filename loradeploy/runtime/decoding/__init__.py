"""Decoding: choosing the next token of each row from the logits, step by step."""

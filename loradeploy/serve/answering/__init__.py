"""Answers: texts as they are generated, streams of them, and tensors."""

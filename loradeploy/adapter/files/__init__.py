"""Adapter and base model files: found, recognized, read and written."""

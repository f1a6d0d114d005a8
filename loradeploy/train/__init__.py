"""Data to adapter: tasks on transformers' Trainer."""

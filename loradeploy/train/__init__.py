"""Train adapters on data: tasks on transformers' Trainer."""

"""The tasks of training: examples, features and losses, in one table."""

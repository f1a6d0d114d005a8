"""A bundle run before it is handed over, and compared with what it was made from."""

"""The inputs that the backends are fed: prompts, token rows, and other inputs of a row."""

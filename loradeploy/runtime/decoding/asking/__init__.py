"""What a call asks for: prompts and their adapters, read and put into batches."""

"""Where a backend that fails parts from the reference, and on how little."""

"""Module names: renaming between versions and classes, and the patterns that select modules."""

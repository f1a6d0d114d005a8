"""Graph surgery: each pass changes one aspect of a graph; its inverse is in the same file."""

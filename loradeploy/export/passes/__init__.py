"""Graph surgery: a pass changes one thing of a graph; what undoes it is in the same file."""

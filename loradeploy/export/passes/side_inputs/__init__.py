"""Make low-rank factors, heads and output scales inputs of a graph, and remove them again."""

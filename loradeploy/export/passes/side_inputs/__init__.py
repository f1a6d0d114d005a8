"""Low-rank factors, heads and scales of outputs as inputs of a graph, and their removal."""

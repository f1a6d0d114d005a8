"""Identify the modules of a checkpoint that the nodes of a graph compute, with the evidence."""

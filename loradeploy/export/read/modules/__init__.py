"""Identify the modules of a graph, and leave those in doubt without adapters."""

"""Graphs that others exported: chosen, completed, and made regular before anything is changed."""

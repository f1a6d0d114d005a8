"""Identify the modules of a product by node names, by a map of the user, or by its weight."""

"""Fit an adapter to a base: check it, remove copies of weights, select its part for a bundle."""

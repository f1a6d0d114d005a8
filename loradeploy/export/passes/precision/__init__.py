"""Weights in the precision that a bundle stores them in."""

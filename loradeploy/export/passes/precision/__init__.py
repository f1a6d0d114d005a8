"""Convert weights to the precision in which a bundle stores them."""

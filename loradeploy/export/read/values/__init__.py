"""Name and complete the inputs and outputs of a graph as a bundle has them."""

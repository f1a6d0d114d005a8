"""Convert adapters to the form that a graph takes: layers, labels and added tokens."""

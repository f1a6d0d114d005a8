"""An adapter in the form that a graph takes: its layers, labels and added tokens."""

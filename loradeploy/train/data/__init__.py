"""Read training data, and convert it to the features of a batch."""

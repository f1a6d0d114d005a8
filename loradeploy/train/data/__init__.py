"""Read training data, and turn it into what a batch is made of."""

"""Convert adapters to inputs of a bundle's graph: factors, DoRA's scales, biases."""

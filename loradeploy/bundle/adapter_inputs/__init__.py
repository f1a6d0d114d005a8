"""An adapter as inputs of a bundle's graph: factors, DoRA's scales, biases."""

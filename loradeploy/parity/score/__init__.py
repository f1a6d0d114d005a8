"""Task metrics of a deployment on held-out data, compared with PyTorch's."""

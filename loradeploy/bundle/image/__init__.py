"""Image inputs of models."""

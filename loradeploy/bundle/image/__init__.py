"""Images as a model takes them."""

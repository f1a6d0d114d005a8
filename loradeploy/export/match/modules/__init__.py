"""Which modules of the checkpoint a product is: by its names, a map of the user, its numbers."""

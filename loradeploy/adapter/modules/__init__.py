"""Module names: of other versions and classes, and the patterns that choose them."""

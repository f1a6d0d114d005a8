"""The phases that every backend runs, and the outputs that are observed in them."""
